"""How a plan writes its numbers: sizes, times, and the labels of rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tpme.bench.run.plan import PlannedCell

FITS = {
    "yes": Text("yes", "green"),
    "tight": Text("tight", "yellow"),
    "no": Text("no", "red"),
    "unknown": Text("not known"),
}
"""Whether a row fits into the memory of a device, as it is shown."""


def row_label(planned: PlannedCell, cells: list[PlannedCell]) -> str:
    """The method, with its options where another row of the table has the same name."""
    twins = sum(other.label == planned.label for other in cells)
    options = ", ".join(f"{name}={value}" for name, value in planned.cell.options.items())
    return f"{planned.label} {options}" if twins > 1 and options else planned.label


def plain_table(*first: str) -> Table:
    """An empty table with its first columns, numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for place, name in enumerate(first):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def scale_of(values: Iterable[float], unit: str) -> tuple[float, str]:
    """The power of 1000 that fits the largest of ``values``, and ``unit`` with its prefix."""
    most = max(values, default=0)
    power = next((power for power in range(6, 0, -1) if most >= 1000**power), 0)
    return 1000.0**power, f"{' kMGTPE'[power].strip()}{unit}"


def in_bytes(size: float) -> str:
    """A size with its unit."""
    scale, unit = scale_of([size], "B")
    return f"{in_digits(size / scale)} {unit}"


def in_digits(value: float) -> str:
    """A number in two or three digits."""
    if 0 < value < 0.005:
        return "<0.01"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def in_time(seconds: float) -> str:
    """A time in the unit that fits it."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h" if seconds < 3_600_000 else f"{seconds / 3600:,.0f} h"
    if seconds >= 1:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if 0 < seconds < 5e-5:
        return "<0.1 ms"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
