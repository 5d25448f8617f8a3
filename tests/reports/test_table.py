from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tpme.bench.quantities import MISSING, number
from tpme.reports.tables.table import (
    Column,
    Entry,
    Table,
    escape_latex,
    escape_markdown,
    to_csv,
    to_json,
    to_latex,
    to_markdown,
)

NASTY = [
    "<script>alert(1)</script>",
    "a_b&c%",
    "x|y\\z",
    "*bold* `code` [link](u)",
    "$x^2$ #1 ~{}",
    '"quoted", comma',
    "[red]markup[/]",
]


def table(names: list[str]) -> Table:
    rows = tuple(
        (Entry(name, name, marks=(2,)), Entry("0.5 ± 0.1", 0.5123456789, index == 0, short="0.5"), Entry("", 0.4))
        for index, name in enumerate(names)
    )
    columns = (
        Column("method", "Method & more", numeric=False),
        Column("x_s", "X (s)", "lower"),
        Column("x_low", machine_only=True),
    )
    return Table("demo", "A_title", columns, rows, ("note 50 %",), ("all <b>",), ("unused", "second: <i>"), "subject")


def test_markdown_shows_names_as_they_are():
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(to_markdown(table(NASTY)))
    assert html.count("<td") == 2 * len(NASTY)
    cells = [re.sub(r"\s*<sup>2</sup>\s*", "", cell) for cell in re.findall(r"<td>(.*?)</td>", html, re.DOTALL)]
    assert [unescape(cell) for cell in cells] == NASTY
    assert "<script" not in html
    assert "<b>" not in html
    assert "<strong>0.5 ± 0.1</strong>" in html


@given(st.text(max_size=30))
def test_markdown_escaping_never_makes_markup(text):
    html = MarkdownIt("commonmark", {"html": True}).renderInline(escape_markdown(f"x{text}x"))
    assert not re.search(r"<(?!br)[a-zA-Z]", html)


def test_latex_is_balanced_and_every_row_is_complete():
    text = to_latex(table(NASTY))
    assert re.findall(r"\\begin\{(\w+)\}", text)[:1] == ["table"]
    stack: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    layout = re.search(r"\\begin\{tabular\}\{@\{\}(.*)@\{\}\}", text)
    assert layout is not None
    assert layout[1] == "lr"
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
    lines = [line for line in body.strip().splitlines() if line]
    assert len(lines) == 1 + len(NASTY)
    for line in lines:
        assert line.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", line)) == 1
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == 1


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=30))
def test_latex_escaping_leaves_no_special_character(text):
    escaped = escape_latex(text)
    commands = r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|char34)\{\}"
    commands += r"|\\texttt\{U\+[0-9A-F]{4}\}"
    rest = re.sub(rf"{commands}|\\[&%$#_{{}}]|\{{[\[\]]\}}|(?<=[-`',])\{{\}}", "", escaped)
    assert not set(rest) & set('\\&%$#_{}~^<>[]|"')


def test_long_texts_are_wrapped_in_latex():
    long = Table("t", "t", (Column("k", "K", numeric=False),), ((Entry("x" * 80, "x" * 80),),))
    assert r"p{0.5\linewidth}" in to_latex(long)


def test_csv_reads_back_unrounded_with_all_columns():
    rows = list(csv.DictReader(io.StringIO(to_csv(table(NASTY)))))
    assert [row["method"] for row in rows] == NASTY
    assert {float(row["x_s"]) for row in rows} == {0.5123456789}
    assert {float(row["x_low"]) for row in rows} == {0.4}


def test_csv_tells_the_footnotes_of_each_row_and_what_is_true_of_all():
    one = table(["plain", "other"])
    unmarked = replace(one, rows=(one.rows[0], (Entry("other", "other"), *one.rows[1][1:])))
    rows = list(csv.DictReader(io.StringIO(to_csv(unmarked))))
    assert [(row["footnotes"], row["warnings"]) for row in rows] == [("second: <i>", "all <b>"), ("", "all <b>")]
    bare = replace(one, rows=unmarked.rows[1:], warnings=())
    assert to_csv(bare).splitlines()[0] == "method,x_s,x_low"


def test_json_reads_back_and_may_stand_in_html():
    text = to_json(table(NASTY))
    assert "<" not in text
    content = json.loads(text)
    assert [row["method"] for row in content["rows"]] == NASTY
    assert content["rows"][0]["footnotes"] == [2]
    assert content["footnotes"] == {"2": "second: <i>"}
    assert content["columns"][1] == {"key": "x_s", "header": "X (s)", "better": "lower"}


def test_missing_values_are_empty_and_null():
    one = Table("t", "t", (Column("a"), Column("b")), ((Entry(MISSING), Entry("", float("nan"))),))
    assert to_csv(one) == "a,b\n,\n"
    assert json.loads(to_json(one))["rows"] == [{"a": None, "b": None, "footnotes": []}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (None, "–"),
        (float("nan"), "–"),
        (443.2, "443"),
        (22.04, "22.0"),
        (0.01234, "0.0123"),
        (999.6, "1000"),
        (0.9996, "1.00"),
        (1e-7, "1.00e-07"),
        (123456.0, "123456"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 entries"):
        Table("t", "t", (Column("a"), Column("b")), ((Entry("1"),),))
