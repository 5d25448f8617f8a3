"""``tpme list``: methods, presets and built-in encoders, as tables for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from tpme.bench.commands.options import AsJson, MethodsPath, PlainCommand

app = typer.Typer(no_args_is_help=True, help="List methods, presets or encoders.")


@app.command(cls=PlainCommand)
def methods(as_json: AsJson = False, methods_path: MethodsPath = None) -> None:
    """List the fine-tuning methods and their options."""
    from tpme.methods.registry import available, method_class

    rows = []
    for name, origin in available(methods_path or []).items():
        cls = method_class(name, methods_path or [])
        rows.append(
            {
                "name": name,
                "what": _summary(sys.modules[cls.__module__].__doc__),
                "cacheable": bool(cls(cls.Config()).frozen_encoders(("text", "image"))),
                "baseline": cls.baseline,
                "options": cls.Config().model_dump(mode="json"),
                "origin": origin,
            }
        )
    _show(rows, as_json)


@app.command(cls=PlainCommand)
def presets(as_json: AsJson = False) -> None:
    """List the matrices that ship with the package."""
    from tpme.bench.run.matrix import load_matrix
    from tpme.bench.run.matrix import presets as paths

    rows = []
    for name in paths():
        matrix = load_matrix(name)
        methods = ", ".join(dict.fromkeys(method.name for method in matrix.methods))
        rows.append({"name": name, "what": matrix.description, "protocol": matrix.protocol, "methods": methods})
    _show(rows, as_json)


@app.command(cls=PlainCommand)
def encoders(as_json: AsJson = False) -> None:
    """List the built-in encoders.

    A matrix may also name a hub ID, a folder, or precomputed states (states:FILE).
    """
    from tpme.bench.task.builtin import BUILTIN, builtin_folder

    rows = []
    for source in BUILTIN:
        config = json.loads((builtin_folder(source) / "config.json").read_text())
        rows.append(
            {
                "name": source,
                "what": "{model_type}, {num_hidden_layers} layers of width {hidden_size}".format(**config),
                "bytes": (builtin_folder(source) / "model.safetensors").stat().st_size,
            }
        )
    _show(rows, as_json)


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as a table for people or as JSON."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(json.dumps(rows, indent=1))  # noqa: T201
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = [key for key in rows[0] if key not in ("options", "origin", "baseline")]
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _summary(docstring: str | None) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")
