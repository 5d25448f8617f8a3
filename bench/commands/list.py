"""What there is to choose from: methods, presets and built-in encoders, as rows for people and for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def methods(methods_path: Sequence[Path] = ()) -> Rows:
    """One row a method: its name, what it does, whether it can be cached, its options with their defaults."""
    from tpme.methods.registry import available, method_class

    rows = []
    for name, origin in available(methods_path).items():
        found = method_class(name, methods_path)
        rows.append(
            {
                "name": name,
                "what": _summary(sys.modules[found.__module__].__doc__),
                "cacheable": found.decoupled,
                "baseline": found.baseline,
                "options": found.Config().model_dump(mode="json"),
                "origin": origin,
            }
        )
    return rows


def presets() -> Rows:
    """One row a matrix that ships with the package."""
    from tpme.bench.run.matrix import load_matrix
    from tpme.bench.run.matrix import presets as paths

    rows = []
    for name in paths():
        matrix = load_matrix(name)
        methods = ", ".join(dict.fromkeys(method.name for method in matrix.methods))
        rows.append({"name": name, "what": matrix.description, "protocol": matrix.protocol, "methods": methods})
    return rows


def encoders() -> Rows:
    """One row a built-in encoder; any other is given by hub id or folder."""
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
    return rows


def show(rows: Rows, *, as_json: bool) -> None:
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
    return (
        ("yes" if value else "no")
        if isinstance(value, bool)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _summary(docstring: str | None) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")
