"""A table as data, and its renderers: Markdown, CSV, LaTeX and JSON (``terminal`` prints it).

Texts may come from configurations and plug-ins, so every renderer escapes them for its format. People read
``Entry.text``; programs read ``Entry.value`` (CSV, JSON), which is not rounded for display.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from tpme.bench.quantities import Better
from tpme.bench.text import csv_field, escaped_json, escaped_lines

Value = str | int | float | None

ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


@dataclass(frozen=True)
class Entry:
    """One field of a table."""

    text: str
    value: Value = None
    best: bool = False
    marks: tuple[int, ...] = ()
    """Numbers of its footnotes, from 1."""
    short: str | None = None
    """The text for a narrow terminal, where it differs."""


@dataclass(frozen=True)
class Column:
    """One column. ``key`` names it for programs and carries the unit; ``header`` is for people."""

    key: str
    header: str = ""
    better: Better | None = None
    numeric: bool = True
    machine_only: bool = False
    """Left out of the formats for people, such as the bounds of an interval."""
    wide_only: bool = False
    """Left out of a terminal too narrow for all columns."""
    fact: bool = False
    """Moves into the caption where it is the same in every row, such as the number of seeds."""

    @property
    def title(self) -> str:
        """The header with its direction arrow."""
        return self.header + ARROWS[self.better]


@dataclass(frozen=True)
class Table:
    """A table with its notes; ``name`` is its file name without the extension."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()
    """What its columns mean; people read them before the table."""
    warnings: tuple[str, ...] = ()
    """Flags that apply to all rows."""
    footnotes: tuple[str, ...] = ()
    """Footnote 1 first; entries refer to them by ``marks``."""
    subject: str = ""
    """Data, protocol, precision and device of the whole table."""
    long: bool = False
    """Left out of ``report.md`` and LaTeX, because it has more rows than people read."""

    def __post_init__(self) -> None:
        """Check that rows and columns agree."""
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.name}: a row does not have {len(self.columns)} entries")

    @property
    def caption(self) -> str:
        """Title, subject and facts."""
        title = f"{self.title}: {self.subject}" if self.subject else self.title
        return f"{title}. {self.facts}" if self.facts else title

    @property
    def facts(self) -> str:
        """A sentence with what is the same in every row; empty without such a column."""
        told = [f"{self.columns[index].header} {self.rows[0][index].text}" for index in self._constant]
        return f"In every row: {'; '.join(told)}." if told else ""

    @property
    def visible(self) -> list[int]:
        """Indices of the columns for people."""
        known = self._constant
        return [index for index, column in enumerate(self.columns) if not column.machine_only and index not in known]

    @cached_property
    def _constant(self) -> list[int]:
        """Indices of the facts that are the same in several rows."""
        facts = [index for index, column in enumerate(self.columns) if column.fact and not column.machine_only]
        return [index for index in facts if self.rows[1:] and len({row[index].text for row in self.rows}) == 1]

    @property
    def used_footnotes(self) -> list[tuple[int, str]]:
        """Number and text of the footnotes that entries refer to."""
        used = {mark for row in self.rows for entry in row for mark in entry.marks}
        return [(mark, self.footnotes[mark - 1]) for mark in sorted(used)]


# --- Markdown ------------------------------------------------------------------------------------------------


def to_markdown(table: Table, footnotes: bool = True) -> str:
    """A list of notes, the pipe table and, unless ``footnotes`` is off, a list of warnings and footnotes."""
    columns = [table.columns[index] for index in table.visible]
    above = [f"- {escape_markdown(note)}" for note in (*table.notes, table.facts) if note]
    lines = [
        *([*above, ""] if above else []),
        markdown_row([escape_markdown(column.title) for column in columns]),
        markdown_row(["---:" if column.numeric else "---" for column in columns]),
        *(markdown_row([_markdown_entry(row[index]) for index in table.visible]) for row in table.rows),
    ]
    below = [f"- {escape_markdown(text)}" for text in table.warnings]
    below += [f"- <sup>{mark}</sup> {escape_markdown(text)}" for mark, text in table.used_footnotes]
    return "\n".join([*lines, *(["", *below] if below and footnotes else [])]) + "\n"


def markdown_row(fields: Iterable[str]) -> str:
    """A line of a pipe table."""
    return f"| {' | '.join(fields)} |"


def _markdown_entry(entry: Entry) -> str:
    text = escape_markdown(entry.text)
    text = f"**{text}**" if entry.best else text
    return text + (f" <sup>{','.join(map(str, entry.marks))}</sup>" if entry.marks else "")


def escape_markdown(text: str) -> str:
    """Escape text so that a Markdown renderer shows it as it is, on one line: no markup, HTML or table separators."""
    text = " ".join(escaped_lines(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|$~#])", r"\\\1", text)


# --- LaTeX ---------------------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # else an optional argument of the \\ before it
    "]": "{]}",
    "|": r"\textbar{}",
    '"': r"\char34{}",  # straight in T1, curly in OT1; \textquotedbl is an error there
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "×": r"$\times$",
    "–": r"\textendash{}",
    "·": r"$\cdot$",
    "✓": r"$\checkmark$",
}


PACKAGES = "array,booktabs,amssymb,graphicx,textcomp"
LONG_NAME = 16
"""Characters of a name from which a compact table wraps it."""


def escape_latex(text: str) -> str:
    """Escape text so that LaTeX prints it as it is; a character without a glyph becomes its code, such as U+4E2D."""
    characters = "".join(map(_latex_character, " ".join(escaped_lines(text).split())))
    return re.sub(r"([-`',])(?=\1)", r"\1{}", characters)  # else -- becomes a dash


@cache
def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    # LaTeX has a glyph for every letter up to this one; beyond, for a few signs.
    known = character.isprintable() and (character <= "\u017f" or character in "‘’“”—…€")
    return character if known else rf"\texttt{{U+{ord(character):04X}}}"


def to_latex(table: Table, *, compact: bool = False) -> str:
    """A ``table`` environment with booktabs rules, shrunk to the line width; notes below in small print.

    A ``compact`` one is set in footnote size and never shrunk; long names wrap.
    """
    columns = [table.columns[index] for index in table.visible]
    layout = "".join(_latex_layout(table, index) for index in table.visible)
    if compact and max((len(row[0].text) for row in table.rows), default=0) > LONG_NAME:
        layout = r">{\raggedright\arraybackslash}p{0.28\linewidth}" + layout[1:]
    rows = [" & ".join(_latex_entry(row[index]) for index in table.visible) + r" \\" for row in table.rows]
    below = [escape_latex(note) for note in (*table.notes, *table.warnings)]
    below += [rf"\textsuperscript{{{mark}}}\,{escape_latex(text)}" for mark, text in table.used_footnotes]
    lines = [
        rf"% needs \usepackage{{{PACKAGES}}}; LaTeX before 2018: \usepackage[utf8]{{inputenc}}",
        r"\begin{table}",
        r"\centering",
        r"\footnotesize" if compact else r"\small",
        rf"\setlength{{\tabcolsep}}{{{3 if compact else 4}pt}}",
        rf"\caption{{{escape_latex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\smallskip",
        *([] if compact else [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]),
        rf"\begin{{tabular}}{{@{{}}{layout}@{{}}}}",
        r"\toprule",
        " & ".join(escape_latex(column.title) for column in columns) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}" + ("" if compact else "}"),
        *([r"\par\medskip", r"\begin{minipage}{\linewidth}\footnotesize\raggedright"] if below else []),
        *(rf"{line}\par" for line in below),
        *([r"\end{minipage}"] if below else []),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_layout(table: Table, index: int) -> str:
    """Numbers right, short texts left, long texts wrapped."""
    if table.columns[index].numeric:
        return "r"
    wrapped = [other for other in table.visible if _is_long(table, other)]
    return rf"p{{{0.5 / len(wrapped):.2g}\linewidth}}" if index in wrapped else "l"


def _is_long(table: Table, index: int) -> bool:
    return not table.columns[index].numeric and max((len(row[index].text) for row in table.rows), default=0) > 50


def _latex_entry(entry: Entry) -> str:
    text = escape_latex(entry.text)
    text = rf"\textbf{{{text}}}" if entry.best else text
    return text + (rf"\textsuperscript{{{','.join(map(str, entry.marks))}}}" if entry.marks else "")


# --- for programs --------------------------------------------------------------------------------------------


def to_csv(table: Table) -> str:
    """All columns, unrounded, under their keys; a missing value is an empty field.

    Two columns at the end hold the footnotes of a row and the warnings on all rows, where there are any.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    texts, warnings = dict(table.used_footnotes), ["; ".join(table.warnings)] if table.warnings else []
    head = [column.key for column in table.columns]
    writer.writerow([*head, *(["footnotes"] if texts else []), *(["warnings"] if warnings else [])])
    for row in table.rows:
        marks = sorted({mark for entry in row for mark in entry.marks})
        notes = ["; ".join(texts[mark] for mark in marks)] if texts else []
        writer.writerow(map(csv_field, [*(plain(entry.value) for entry in row), *notes, *warnings]))
    return file.getvalue()


def to_json(table: Table) -> str:
    """Title, columns, rows as objects, notes and footnotes. ``<`` and ``>`` are escaped for use in HTML."""
    content = {
        "title": table.title,
        "subject": table.subject,
        "columns": [{"key": column.key, "header": column.header, "better": column.better} for column in table.columns],
        "rows": [
            {
                **{column.key: plain(entry.value) for column, entry in zip(table.columns, row, strict=True)},
                "footnotes": sorted({mark for entry in row for mark in entry.marks}),
            }
            for row in table.rows
        ],
        "notes": list(table.notes),
        "warnings": list(table.warnings),
        "footnotes": {str(mark): text for mark, text in table.used_footnotes},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return escaped_json(text).replace("<", "\\u003c").replace(">", "\\u003e") + "\n"


def plain(value: Value) -> Value:
    """A value for programs: ten significant digits, because more differ between machines; None for NaN."""
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value
