"""Consoles and messages for text of unknown origin: nothing in it is markup, and nothing in it is hidden."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from tpme.bench.redact import without_credentials
from tpme.bench.text import escaped_json, escaped_lines, visible

LONGEST_LINE = 1000
"""Characters of a message on stderr."""


class PlainConsole(Console):
    """A console without markup, on which control and bidirectional characters are escapes; see ``visible``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a text, such as the cell of a table, whose width is that of what is shown."""
        return super().render_str(escaped_lines(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of anything printed, in a table or by itself."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escaped_lines(text), style, control)


def print_json(text: str) -> None:
    """Print a text in JSON, without a raw control character; its value stays."""
    print(escaped_json(text))  # noqa: T201


def complain(message: object) -> None:
    """Print a message as one line without credentials on stderr."""
    print(f"tpme: {without_credentials(visible(message, LONGEST_LINE))}", file=sys.stderr)  # noqa: T201


def replace_unencodable() -> None:
    """Let stdout and stderr write an escape for a character that their encoding lacks, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
