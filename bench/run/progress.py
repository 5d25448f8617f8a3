"""What the console shows of a matrix: bars on a terminal, elsewhere a line a minute, and how every cell ended."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from tpme.bench.quantities import MISSING
from tpme.bench.record import REBUILT, CellResult
from tpme.bench.run.remaining import Remaining, ended_badly, in_words
from tpme.bench.text import escaped

LINE_S = 60.0
"""Time between two lines where there is no terminal to draw bars on."""


class Screen:
    """The progress of a matrix on a console.

    Args:
        console: where to print. cells: number of cells of the matrix.
    """

    def __init__(self, console: Console, cells: int) -> None:
        self.console, self.cells, self.done = console, cells, 0
        self.bars = Progress(
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._overall = self.bars.add_task("matrix", total=cells, detail="")
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def print(self, text: str) -> None:
        """Print one sentence above the bars, on one line."""
        self.console.print(escaped(text), soft_wrap=True)

    @contextlib.contextmanager
    def cell(self, label: str) -> Iterator[Callable[[str, float], None]]:
        """The progress of one cell; gives the function that takes it."""
        bar = self.bars.add_task(label, total=100, detail="start")

        def show(what: str, share: float) -> None:
            what = without_total(what)
            self.bars.update(bar, completed=round(100 * share), detail=what)
            self._line(label, what, share)

        try:
            yield show
        finally:
            self.bars.remove_task(bar)

    def advance(self) -> None:
        """One more cell is finished."""
        self.done += 1
        self.bars.advance(self._overall)

    def state(self, text: str) -> None:
        """Show how the cells that run elsewhere are doing; without a terminal in a line a minute."""
        self.bars.update(self._overall, detail=text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= LINE_S:
            self._last_line = now
            self.print(
                f"{self.done} of {self.cells} cells finished, {text}; running for {in_words(now - self._started)}"
            )

    def _line(self, label: str, what: str, share: float) -> None:
        """Without a terminal: one line, unless the last one is less than a minute old."""
        now = time.monotonic()
        if self.console.is_terminal or now - self._last_line < LINE_S:
            return
        self._last_line = now
        place, running = f"{self.done + 1} of {self.cells}", in_words(now - self._started)
        self.print(f"{label} (cell {place}): {what}, {share:.0%}; running for {running}")

    def print_outcome(self, result: CellResult, log: Path) -> None:
        """Print how a cell ended in one line; of one that failed where its log is, of one that is odd why."""
        self.console.print(outcome_line(result), soft_wrap=True)
        if result.untrained is not None:
            self.print(f"{'':<18} {result.untrained.message}")
        for flag in result.flags:
            if flag.code == REBUILT:
                self.print(f"{'':<18} {flag.message}")
        if result.status != "ok":
            self.print(f"{'':<18} log: {log}")


def without_total(what: str) -> str:
    """``what``, but "epoch 31" for "epoch 31/2": rounds of two epochs each count their epochs on."""
    numbers = re.fullmatch(r"epoch (\d+)/(\d+)", what)
    return f"epoch {numbers[1]}" if numbers and int(numbers[1]) > int(numbers[2]) else what


def outcome_line(result: CellResult) -> Text:
    """The outcome of a cell in one line."""
    label, mark = f"{result.cell.label:<18} ", (result.status, "green" if result.status == "ok" else "red")
    if result.failure:
        return Text.assemble(label, mark, f"  {result.failure.message}")
    best = max((epoch.valid_recall_10 for epoch in result.epochs if epoch.valid_recall_10 is not None), default=None)
    if result.in_rounds and "valid_recall_10" in result.counters:
        best = result.counters["valid_recall_10"].value
    pass_s, all_in_s = result.pass_time_s.value, result.all_in_s.value if result.all_in_s else None
    details = [f"{result.wall_s:.1f} s"]
    if pass_s is not None:
        details.append(f"{pass_s:.2f} s {'a pass' if result.in_rounds else 'an epoch'}")
    else:
        details.append(f"{all_in_s:.2f} s all in" if all_in_s is not None else "nothing to train")
    if best is not None:
        details.append(f"validation Recall@10 {best:.4f}")
    return Text.assemble(label, mark, f"  {', '.join(details)}")


def remaining_table(state: Remaining) -> Table:
    """The rows of a matrix: how many of their cells are finished, and how long the others should take."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("Row", "Finished", "To run", "Expected time"):
        table.add_column(title, overflow="fold")
    for name, row in zip(row_names(state), state.rows, strict=True):
        finished = f"{sum(row.ended.values())} of {row.cells}"
        if badly := ended_badly([row]):
            finished += f" ({badly})"
        expected = "not known" if row.missing_s is None else in_words(row.missing_s)
        table.add_row(name, finished, str(row.missing or MISSING), expected if row.missing else MISSING)
    return table


def row_names(state: Remaining) -> list[str]:
    """A name for each row: its method, and whatever tells it from the others."""
    cells = [row.cell for row in state.rows]
    texts = [
        {
            "data": cell.dataset,
            "encoders": " + ".join(spec.source for spec in (cell.text_encoder, cell.image_encoder) if spec),
            "training": ", ".join(
                f"{key}={value}"
                for key, value in cell.training.model_dump().items()
                if any(getattr(other.training, key) != value for other in cells)
            ),
            "options": ", ".join(f"{key}={value}" for key, value in cell.options.items()),
        }
        for cell in cells
    ]
    names = []
    for cell, text in zip(cells, texts, strict=True):
        twins = [other for twin, other in zip(cells, texts, strict=True) if twin.label == cell.label]
        differing = [words for key, words in text.items() if words and any(twin[key] != words for twin in twins)]
        names.append(", ".join([cell.label, *differing]))
    return names
