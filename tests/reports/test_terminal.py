from __future__ import annotations

import io
import re
from collections.abc import Container

import pytest
from rich.console import Console

from tpme.reports.report import make_report
from tpme.reports.tables.results import all_tables
from tpme.reports.tables.table import Column, Entry, Table
from tpme.reports.tables.terminal import to_terminal

NAMES = Table(
    "demo",
    "A_title",
    (
        Column("method", "Method & more", numeric=False),
        Column("x_s", "X (s)", "lower"),
        Column("low", machine_only=True),
    ),
    tuple(
        (Entry(name, name, marks=(2,)), Entry("0.5 ± 0.1", 0.5, short="0.5"), Entry("", 0.4))
        for name in ("[red]markup[/]", "plain")
    ),
    ("note 50 %",),
    ("all <b>",),
    ("unused", "second: <i>"),
)


def printed(table: Table, width: int, told: Container[str] = ()) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), color_system=None)
    console.print(to_terminal(table, width, told))
    return console.export_text()


@pytest.mark.parametrize(("width", "shown", "hidden"), [(120, "0.5 ± 0.1", None), (24, "0.5", "±")])
def test_terminal_prints_names_as_they_are_and_fits(width, shown, hidden):
    text = printed(NAMES, width)
    assert shown in text
    assert hidden is None or hidden not in text
    assert "second: <i>" in text
    assert "unused" not in text
    if width == 120:
        assert "[red]markup[/]" in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(("width", "there"), [(60, True), (24, False)])
def test_a_narrow_terminal_leaves_out_columns_before_it_breaks_names(width, there):
    columns = (Column("method", "Method", numeric=False), Column("seeds", "Seeds", wide_only=True), Column("x", "X"))
    one = Table("t", "t", columns, ((Entry("popularity"), Entry("17 of 20"), Entry("12.5 ± 0.1")),))
    text = printed(one, width)
    assert ("17 of 20" in text) is there
    assert "popularity" in text
    assert "12.5" in text


def test_what_was_told_is_left_out():
    text = printed(NAMES, 80, {"all <b>", "second: <i>"})
    assert "note 50 %" in text
    assert "all <b>" not in text
    assert "second" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_table_of_a_run_fits_and_no_number_is_broken(demo_run, width):
    (section,) = make_report([demo_run]).sections
    for table in all_tables(section):
        text = printed(table, width)
        assert max(map(len, text.splitlines())) <= width, table.name
        words = set(text.split())
        for row in table.rows:
            for index, (column, entry) in enumerate(zip(table.columns, row, strict=True)):
                if column.numeric and index in table.visible and not column.wide_only:
                    shown = (entry.text, entry.text if entry.short is None else entry.short)
                    assert any(set(text.split()) <= words for text in shown), (table.name, column.key)


def test_what_does_not_fit_is_continued_below_under_the_names():
    keys = [f"a long header {index}" for index in range(8)]
    columns = (Column("method", "Method", numeric=False), *(Column(key, key) for key in keys))
    rows = tuple((Entry(name), *(Entry(f"{index}00 ± {index}0") for index in range(8))) for name in ("fft", "lora"))
    text = printed(Table("t", "t", columns, rows), 40)
    assert text.count("fft ") == text.count("lora ") == len(re.findall("^ ─+", text, re.MULTILINE)) == 3
    assert all(f"{index}00 ± {index}0" in text for index in range(8))
