"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Matrix = Annotated[str, typer.Argument(metavar="MATRIX", help="Name of a preset, or a TOML file.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting of the matrix: training.epochs=2.")
]
MethodsPath = Annotated[list[Path] | None, typer.Option(help="Folder with further methods.")]
Store = Annotated[
    Path | None, typer.Option(help="Where prepared data, caches and device profiles are kept between runs.")
]
DeviceName = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
Records = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUNS",
        help="Run folders or record files; by default all below ./runs.",
        default_factory=lambda: [Path("runs")],
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def split_names(text: str | None) -> list[str]:
    """The names of a comma-separated list; none of ``None``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
