"""A table in a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import rich.box
import rich.table
from rich.console import Group
from rich.text import Text

from tpme.reports.tables.table import Column, Entry, Table

LONGEST_WORD = 12
"""Characters of a name that a terminal does not break within a word."""
SHORTEST_LINE = 40
"""Characters of a text that a terminal does not break before it leaves something out."""


def to_terminal(table: Table, width: int = 120, told: Container[str] = ()) -> Group:
    """Title, table and notes, no line longer than ``width``.

    Where that is too narrow, first the columns that are ``wide_only`` are left out, then shorter texts used. What still
    does not fit is continued below, every part with the first column. Warnings and footnotes in ``told`` are left out.
    """
    narrow = [index for index in table.shown if not table.columns[index].wide_only]
    parts, short = [table.shown], False
    if _room(table, table.shown, width, False, _good_width) < 0:
        parts = [narrow]
        if _room(table, narrow, width, False, _good_width) < 0:
            short = _room(table, narrow, width, True, _least_width) >= 0
            parts = [narrow] if short else _parts(table, width)
    notes = [*table.notes, *(text for text in table.warnings if text not in told)]
    notes += [f"{mark}  {text}" for mark, text in table.used_footnotes if text not in told]
    drawn = (_drawn(table, part, width, short) for part in parts)
    return Group(Text(table.caption), *drawn, *([Text("\n".join(notes))] if notes else []))


def _drawn(table: Table, columns: Sequence[int], width: int, short: bool) -> rich.table.Table:
    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 0 if short else 1), pad_edge=False)
    numbers = all(table.columns[index].numeric for index in columns[1:])
    widths = _widths(table, columns, width, short)
    for index in columns:
        column = table.columns[index]
        drawn.add_column(
            Text(_title(column, widths[index])), justify="right" if column.numeric else "left", overflow="fold",
            vertical="bottom" if numbers else "top", width=widths[index],
        )  # fmt: skip
    for row in table.rows:
        drawn.add_row(*(_terminal_entry(row[index], short) for index in columns))
    return drawn


def _widths(table: Table, columns: Sequence[int], width: int, short: bool) -> dict[int, int]:
    """Of every column: rich breaks what must not be broken, unless it is told. What is left goes to names first."""
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
    """The columns in as many parts as it takes, the first one in all of them."""
    first, *rest = table.shown
    parts = [[first]]
    for index in rest:
        if len(parts[-1]) > 1 and _room(table, [*parts[-1], index], width, False, _good_width) < 0:
            parts.append([first])
        parts[-1].append(index)
    return parts


def _room(table: Table, columns: Sequence[int], width: int, short: bool, of: Callable[[Table, int, bool], int]) -> int:
    """Characters that are left of a line when every column is as wide as ``of`` says."""
    between = 1 if short else 2
    return width - 1 - sum(of(table, index, short) + between for index in columns)


def _full_width(table: Table, index: int, short: bool) -> int:
    """Characters of a column where nothing is wrapped."""
    texts = (_terminal_entry(row[index], short) for row in table.rows)
    return max([len(table.columns[index].title), *map(len, texts)])


def _good_width(table: Table, index: int, short: bool) -> int:
    """As ``_least_width``, but no short line of a text is broken."""
    if table.columns[index].numeric:
        return _least_width(table, index, short)
    return min(_full_width(table, index, short), SHORTEST_LINE)


def _least_width(table: Table, index: int, short: bool) -> int:
    """Names may be broken between words, long ones anywhere; numbers nowhere, headers between words."""
    column, texts = table.columns[index], [_terminal_entry(row[index], short) for row in table.rows]
    words = [len(word) for text in (_title(column, 0), *map(str, texts)) for word in text.split()]
    return max([*words, *map(len, texts)]) if column.numeric else min(max(words), LONGEST_WORD)


def _title(column: Column, width: int) -> str:
    """The header; where it must be wrapped, its arrow does not come on a line of its own."""
    return column.title if width >= len(column.title) else "".join(column.title.rsplit(" ", bool(column.better)))


def _terminal_entry(entry: Entry, short: bool) -> Text:
    text = Text(entry.short if short and entry.short is not None else entry.text, style="bold" if entry.best else "")
    if entry.marks:
        text.append(" " + ",".join(map(str, entry.marks)), style="dim")
    return text
