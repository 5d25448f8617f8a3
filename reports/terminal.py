"""A table in a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import rich.box
import rich.table
from rich.console import Group
from rich.text import Text

from tpme.reports.table import Entry, Table

LONGEST_WORD = 12
"""Characters of a name that a terminal does not break within a word."""
SHORTEST_LINE = 40
"""Characters of a text that a terminal does not break where it can be continued below."""


def to_terminal(table: Table, width: int = 120, told: Container[str] = ()) -> Group:
    """Title, table and notes, no line longer than ``width``.

    Where that is too narrow, shorter texts are used and the columns that are ``wide_only`` left out. What still does
    not fit is continued below, every part with the first column. Warnings and footnotes in ``told`` are left out.
    """
    parts = [table.shown]
    short = _room(table, table.shown, width, False, _full_width) < 0
    if short:
        parts = [[index for index in table.shown if not table.columns[index].wide_only]]
        if _room(table, parts[0], width, short, _least_width) < 0:
            short, parts = False, _parts(table, width)
    notes = [*table.notes, *(text for text in table.warnings if text not in told)]
    notes += [f"{mark}  {text}" for mark, text in table.used_footnotes if text not in told]
    drawn = (_drawn(table, part, width, short) for part in parts)
    return Group(Text(table.caption), *drawn, *([Text("\n".join(notes))] if notes else []))


def _drawn(table: Table, columns: Sequence[int], width: int, short: bool) -> rich.table.Table:
    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 0 if short else 1), pad_edge=False)
    numbers = all(table.columns[index].numeric for index in columns[1:])
    room = max(0, _room(table, columns, width, short, _least_width))
    for index in columns:  # rich breaks what must not be broken, unless it is told every width
        column, least = table.columns[index], _least_width(table, index, short)
        more = min(room, _full_width(table, index, short) - least)
        room -= more
        drawn.add_column(
            Text(column.title), justify="right" if column.numeric else "left", overflow="fold",
            vertical="bottom" if numbers else "top", width=least + more,
        )  # fmt: skip
    for row in table.rows:
        drawn.add_row(*(_terminal_entry(row[index], short) for index in columns))
    return drawn


def _parts(table: Table, width: int) -> list[list[int]]:
    """The columns in as many parts as it takes, the first one in all of them."""
    first, *rest = table.shown
    parts = [[first]]

    def needed(table: Table, index: int, short: bool) -> int:
        whole = _full_width(table, index, short)
        return _least_width(table, index, short) if table.columns[index].numeric else min(whole, SHORTEST_LINE)

    for index in rest:
        if len(parts[-1]) > 1 and _room(table, [*parts[-1], index], width, False, needed) < 0:
            parts.append([first])
        parts[-1].append(index)
    return parts


def _room(table: Table, columns: Sequence[int], width: int, short: bool, of: Callable[[Table, int, bool], int]) -> int:
    """Characters that are left of a line when every column is as wide as ``of`` says."""
    between = 1 if short else 2
    return width - 1 - sum(of(table, index, short) + between for index in columns)


def _full_width(table: Table, index: int, short: bool) -> int:
    """Characters of a column where nothing is wrapped."""
    return max([len(table.columns[index].title), *(len(_terminal_entry(row[index], short)) for row in table.rows)])


def _least_width(table: Table, index: int, short: bool) -> int:
    """Names may be broken between words, long ones anywhere; numbers nowhere, headers between words."""
    column, texts = table.columns[index], [_terminal_entry(row[index], short) for row in table.rows]
    words = [len(word) for text in (column.title, *map(str, texts)) for word in text.split()]
    return max([*words, *map(len, texts)]) if column.numeric else min(max(words), LONGEST_WORD)


def _terminal_entry(entry: Entry, short: bool) -> Text:
    text = Text(entry.short if short and entry.short is not None else entry.text, style="bold" if entry.best else "")
    if entry.marks:
        text.append(" " + ",".join(map(str, entry.marks)), style="dim")
    return text
