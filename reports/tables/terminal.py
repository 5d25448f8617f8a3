"""A table in a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import rich.box
import rich.table
from rich.console import Group
from rich.text import Text

from tpme.reports.tables.table import Column, Entry, Table

LONGEST_WORD = 12
"""Words of a name up to this many characters are not broken."""
SHORTEST_LINE = 40
"""Texts up to this many characters are broken only after columns are left out."""


def to_terminal(table: Table, width: int = 120, printed: Container[str] = ()) -> Group:
    """Title, notes, table, warnings and footnotes, no line longer than ``width``.

    A narrow terminal first loses the ``wide_only`` columns, then gets shorter texts; a table that still does not fit is
    continued below, every part with the first column. Notes, warnings and footnotes in ``printed`` are left out.
    """
    narrow = [index for index in table.visible if not table.columns[index].wide_only]
    parts, short = [table.visible], False
    if _room(table, table.visible, width, False, _good_width) < 0:
        parts = [narrow]
        if _room(table, narrow, width, False, _good_width) < 0:
            short = True
            parts = [narrow] if _room(table, narrow, width, True, _least_width) >= 0 else _parts(table, width)
    below = [text for text in table.warnings if text not in printed]
    below += [f"{mark}  {text}" for mark, text in table.used_footnotes if text not in printed]
    grids = (_grid(table, part, width, short) for part in parts)
    notes = [note for note in table.notes if note not in printed]
    return Group(*map(Text, (table.caption, *notes)), *grids, *map(Text, below))


def _grid(table: Table, columns: Sequence[int], width: int, short: bool) -> rich.table.Table:
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 0 if short else 1), pad_edge=False)
    numbers = all(table.columns[index].numeric for index in columns[1:])
    widths = _widths(table, columns, width, short)
    for index in columns:
        column = table.columns[index]
        grid.add_column(
            Text(_title(column, widths[index])), justify="right" if column.numeric else "left", overflow="fold",
            vertical="bottom" if numbers else "top", width=widths[index],
        )  # fmt: skip
    for row in table.rows:
        grid.add_row(*(_terminal_entry(row[index], short) for index in columns))
    return grid


def _widths(table: Table, columns: Sequence[int], width: int, short: bool) -> dict[int, int]:
    """Width of every column (rich would break numbers); room to spare goes to names first."""
    widths = {index: _least_width(table, index, short) for index in columns}
    wanted = {index: _full_width(table, index, short) - least for index, least in widths.items()}
    room = max(0, _room(table, columns, width, short, _least_width))
    order = [columns[0], *sorted(columns[1:], key=lambda index: wanted[index])]
    for place, index in enumerate(order):
        more = min(wanted[index], room if place == 0 else room // (len(order) - place))
        widths[index] += more
        room -= more
    return widths


def _parts(table: Table, width: int) -> list[list[int]]:
    """The columns in as many parts as their shorter texts need, the first column in each."""
    first, *rest = table.visible
    parts = [[first]]
    for index in rest:
        if len(parts[-1]) > 1 and _room(table, [*parts[-1], index], width, True, _good_width) < 0:
            parts.append([first])
        parts[-1].append(index)
    return parts


def _room(table: Table, columns: Sequence[int], width: int, short: bool, of: Callable[[Table, int, bool], int]) -> int:
    """Characters left on a line when every column has the width ``of``."""
    between = 1 if short else 2
    return width - 1 - sum(of(table, index, short) + between for index in columns)


def _full_width(table: Table, index: int, short: bool) -> int:
    """Characters of a column without wrapping."""
    texts = (_terminal_entry(row[index], short) for row in table.rows)
    return max([len(table.columns[index].title), *map(len, texts)])


def _good_width(table: Table, index: int, short: bool) -> int:
    """As ``_least_width``, but short texts are not broken."""
    if table.columns[index].numeric:
        return _least_width(table, index, short)
    return min(_full_width(table, index, short), SHORTEST_LINE)


def _least_width(table: Table, index: int, short: bool) -> int:
    """Names break between words, long words anywhere; headers break between words, numbers never."""
    column, texts = table.columns[index], [_terminal_entry(row[index], short) for row in table.rows]
    words = [len(word) for text in (_title(column, 0), *map(str, texts)) for word in text.split()]
    return max([*words, *map(len, texts)]) if column.numeric else min(max(words), LONGEST_WORD)


def _title(column: Column, width: int) -> str:
    """The header; where it wraps, its arrow stays with the last word."""
    return column.title if width >= len(column.title) else "".join(column.title.rsplit(" ", bool(column.better)))


def _terminal_entry(entry: Entry, short: bool) -> Text:
    text = Text(entry.short if short and entry.short is not None else entry.text, style="bold" if entry.best else "")
    if entry.marks:
        text.append(" " + ",".join(map(str, entry.marks)), style="dim")
    return text
