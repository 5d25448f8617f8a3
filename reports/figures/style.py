"""What all figures share: their look, axes, row labels, and how they are saved. The same records give the same bytes.

Figures are made without pyplot, so nothing global is left behind. Widths are those of a paper's column; colours
are those of Okabe and Ito, which colour-blind readers can tell apart. Texts are never read as mathematics.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tpme.reports.data.load import Array
from tpme.reports.data.section import Section

COLUMN_INCHES = 3.5
LOG_FROM = 20
"""An axis is logarithmic where the largest value is more than this many times the smallest."""

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9", "#F0E442")
"""Of parts of a whole, in this order."""
GREY, SILVER, PALE = "#666666", "#AAAAAA", "#DDDDDD"

SETTINGS = {
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.titley": 1.0,  # else every drawing measures all ticks to place titles above them
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": PALE,
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.minor.width": 0.3,
    "hatch.linewidth": 0.4,
    "text.parse_math": False,
    "svg.hashsalt": "tpme",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # TrueType: many conferences refuse Type 3
}


@dataclass(frozen=True)
class Plot:
    """A finished figure; ``name`` is its file name without the ending."""

    name: str
    title: str
    caption: str
    figure: Figure


@contextmanager
def style() -> Iterator[None]:
    """The look, inside a ``with`` block only."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def margins(
    figure: Figure, left: float, right: float, bottom: float, top: float, across: float = 0, down: float = 0
) -> None:
    """Room around the axes and, for panels, ``across`` and ``down`` between them, in inches.

    Set by hand because the automatic layouts draw every figure several times to find the same.
    """
    width, height = figure.get_size_inches()
    grid: Any = figure.axes[0].get_gridspec()
    columns, rows = grid.ncols, grid.nrows
    panel_width = (width - left - right - (columns - 1) * across) / columns
    panel_height = (height - bottom - top - (rows - 1) * down) / rows
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        wspace=across / panel_width, hspace=down / panel_height,
    )  # fmt: skip


def text_width(figure: Figure, texts: Iterable[str], size: float) -> float:
    """Width of the longest text in inches."""
    canvas: Any = figure.canvas
    renderer = canvas.get_renderer()
    widths = [0.0]
    for text in texts:
        drawn = figure.text(0, 0, text, fontsize=size)
        widths.append(drawn.get_window_extent(renderer).width)
        drawn.remove()
    return float(max(widths) / figure.dpi)


def name_rows(
    figure: Figure,
    axes: Any,
    names: Sequence[str],
    *,
    right: float = 0.05,
    bottom: float = 0.36,
    top: float = 0.2,
    across: float = 0,
) -> Array:
    """Names on the left of horizontal bars, with the room they need. Returns where the bars go, from the top down.

    The other lengths are the room around the axes and between panels, in inches.
    """
    position = np.arange(len(names), dtype=np.float64)[::-1]
    axes.set_yticks(position, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    margins(figure, text_width(figure, names, 6.5) + 0.12, right, bottom, top, across=across)
    return position


def log_axis(axes: Any, low: float, high: float, most: int = 3) -> None:
    """A logarithmic x axis from ``low`` to ``high`` with at most so many ticks."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_round_values(low, high, most)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _round_values(low: float, high: float, most: int) -> list[float]:
    """As many as fit: 1, 2 and 5 or 1 and 3 of every power of ten, each power, or every n-th, 1 among them."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        values = [digit * 10.0**power for power in powers for digit in digits]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= most:
            return inside
    stride = math.ceil(len(inside) / most)
    return [value for value in inside if round(math.log10(value)) % stride == 0]


def _power(value: float) -> str:
    """0.01 to 1000 as they are, what is beyond as a short power of ten."""
    if 0.0099 <= value <= 5000:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**power)
    raised = "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return raised if digit == 1 else f"{digit}·{raised}"


PDF_METADATA = {"CreationDate": None, "Creator": None, "Producer": None}


def save(figure: Figure, ending: str) -> bytes:
    """The figure as ``png``, ``svg`` or ``pdf``, without dates or versions in it."""
    file = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": PDF_METADATA}[ending]
    with style():
        figure.savefig(file, format=ending, metadata=metadata)
    return file.getvalue()


def shorten(name: str, limit: int = 24) -> str:
    """A name that fits beside an axis, its middle left out: rows often differ in their ends. Tables give it in full."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[limit // 2 + 1 - limit :]}"


def row_label(section: Section, name: str, limit: int = 24) -> str:
    """Name of a row beside an axis, with ``*`` where it has footnotes and its end where it did not finish."""
    status = str(section.summary.loc[name, "status"])
    mark = "*" if section.notes.marks[name] else ""
    return shorten(name, limit) + mark + ("" if status == "ok" else f" ({status})")
