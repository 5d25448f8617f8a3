"""A case of the corpus, and the values that its families try in every place where something enters.

A family is a file ``family_*.py`` beside this one with a function ``cases() -> Iterator[Case]``.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One command line on hostile input.

    Attributes:
        name: family, value and place.
        arrange: writes the input into the folder it is given, the working directory, and returns the arguments.
        answers: exit codes beside 0 that are no error: ``choose``, ``plan`` and ``check`` have some.
        refused: exit code of bad input.
        encoding: of stdout and stderr.
        says: what the message holds (a regular expression), where the input must be refused.
    """

    name: str
    arrange: Callable[[Path], Sequence[str]]
    answers: tuple[int, ...] = ()
    refused: int = 2
    encoding: str = "utf-8"
    says: str | None = None


def corpus() -> Iterator[Case]:
    """Yield the cases of every family."""
    for file in sorted(Path(__file__).parent.glob("family_*.py")):
        yield from importlib.import_module(f"hostile.{file.stem}").cases()


def places(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every table, list and value in a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix, *(place for key, entry in inner for place in places(entry, (*prefix, key)))]


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a tree with another value at a place."""
    if not place:
        return value
    other = copy.copy(tree)
    other[place[0]] = replaced(tree[place[0]], place[1:], value)
    return other


TEXTS = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clear": "\x1b[2J\x1b[H",
    "c1": "\x9b31mred",
    "bell": "a\x07b\x08c",
    "return": "good\rbad",
    "newline": "one\ntwo\n::error::three",
    "separator": "one\u2028two\u2029three\x85four",
    "override": "abc\u202egnp.exe",
    "isolate": "a\u2066b\u2069c\u200fd",
    "tags": "a\U000e0041\U000e007fb",
    "zero-width": "a\u200bb\ufeffc\u00add",
    "nul": "nul\x00nul",
    "delete": "a\x7fb",
    "markup": "[/]",
    "markup-link": "[bold][link=http://evil.example]x[/link]",
    "emoji-code": ":skull: :warning:",
    "formula": '=HYPERLINK("http://evil.example")',
    "formula-at": "@SUM(1+1)*cmd|'/c calc'!A0",
    "formula-tab": "\t=1+1",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)',
    "latex": "\\input{/etc/passwd}\\end{tabular} $x^",
    "markdown": "[x](javascript:alert(1)) ![y](http://evil.example/z) `code` | cell | **b**",
    "format": "{0.__class__} %s %n ${HOME} $(id) `id`",
    "long": "long " * 40_000,
    "wide": "字" * 300,
    "combining": "a" + "\u0301" * 500,
    "empty": "",
    "spaces": "  \u00a0 ",
}
"""Texts that a terminal, a spreadsheet, a browser, LaTeX, Markdown, a log or a template could act on."""
