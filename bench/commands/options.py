"""Options that several commands have, and how the help of a command shows its options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tpme.bench.console import LONGEST_LINE
from tpme.bench.redact import without_credentials
from tpme.bench.text import visible


def _presets_like(incomplete: str) -> list[str]:
    """Names of presets for the shell's completion; where there are none, the shell completes file names."""
    from tpme.bench.run.matrix import presets

    return [name for name in presets() if name.startswith(incomplete)]


def methods_like(incomplete: str) -> list[str]:
    """Names of methods for the shell's completion."""
    from tpme.methods.registry import available

    return [name for name in available() if name.startswith(incomplete)]


Matrix = Annotated[
    str,
    typer.Argument(metavar="MATRIX", autocompletion=_presets_like, help="Name of a preset, or a TOML file."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the matrix: training.epochs=2."),
]
MethodsPath = Annotated[list[Path] | None, typer.Option(metavar="FOLDER", help="Folder with further methods.")]
Store = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where prepared data, caches and device profiles are kept between runs."),
]
DeviceName = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, or auto: a GPU if there is one.")]
Records = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUNS",
        help="Run folders or record files; by default all below ./runs.",
        default_factory=lambda: [Path("runs")],
        show_default=False,
    ),
]
WORDS = {"path": "PATH", "str": "TEXT", "int": "N", "float": "NUMBER"}
"""What an option takes, by its type, where it has no metavar."""
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


class PlainGroup(TyperGroup):
    """The program: an error about its arguments quotes them in one visible line, without credentials."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the options before the command."""
        with _visible_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command and its arguments, and run it."""
        with _visible_errors():
            return super().invoke(ctx)


@contextmanager
def _visible_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A usage error, whichever click it comes from; that of no arguments at all is the help.
        if hasattr(error, "format_message") and type(error).__name__ != "NoArgsIsHelpError":
            message = without_credentials(getattr(error, "message", ""))
            error.message = visible(message, LONGEST_LINE)  # type: ignore[attr-defined]
        raise


class PlainCommand(TyperCommand):
    """A command whose help names what an option takes by a word (``FOLDER``), where typer shows the Python type."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, by name alone, then the options."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            parameters = [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == kind]
            rows = [row for parameter in parameters if (row := parameter.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(_in_words(name, kind), text) for name, text in rows])


def _in_words(name: str, kind: str) -> str:
    """``--out <path>`` as ``--out PATH``, ``RUNS <list[Path]>`` as ``RUNS``."""
    if kind == "argument":
        return re.sub(" <.*>", "", name)
    return re.sub(r"<(?:list\[)?(\w+).*>", lambda found: WORDS.get(found[1].lower(), "VALUE"), name)


def split_names(text: str | None) -> list[str]:
    """The names of a comma-separated list; none of ``None``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
