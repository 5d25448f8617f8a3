"""``tpme list``: methods, presets and built-in encoders, as tables for people or JSON for programs."""

from __future__ import annotations

import inspect
import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpme.bench.commands.options import AsJson, MethodsPath, PlainCommand, methods_like
from tpme.bench.console import PlainConsole, print_json
from tpme.bench.errors import UserError
from tpme.bench.text import escaped, visible

if TYPE_CHECKING:
    from tpme.methods.base import Method

app = typer.Typer(no_args_is_help=True, help="List methods, presets or encoders.")


@app.command(cls=PlainCommand)
def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAMES", autocompletion=methods_like, help="Only these, with all that is known of them."
        ),
    ] = None,
    as_json: AsJson = False,
    methods_path: MethodsPath = None,
) -> None:
    """List the fine-tuning methods and their options."""
    from tpme.methods.registry import available, method_class

    origins = available(methods_path or [])
    classes, rows = {}, []
    for name in names or origins:
        try:
            classes[name] = method_class(name, methods_path or [])
            rows.append(_method_row(name, classes[name], origins[name]))
        except UserError as error:
            if names:
                raise
            rows.append({"name": name, "origin": origins[name], "fault": str(error)})
    if as_json:
        print_json(json.dumps(rows, indent=1))
    elif names:
        for row in rows:
            _show_method(row, classes[row["name"]])
    else:
        _show_methods(rows)


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


def _method_row(name: str, cls: type[Method], origin: str) -> dict[str, Any]:
    """What is known of a method; raises UserError where its own code fails.

    Whether it can be cached is not known (``None``) where options have no default.
    """
    from tpme.methods.registry import blaming

    with blaming(name):
        fields = cls.Config.model_fields
        required = [option for option, field in fields.items() if field.is_required()]
        method = None if required else cls(cls.Config())
        defaults = {name: field.get_default() for name, field in fields.items()} if required else dict(cls.Config())
        return {
            "name": name,
            "what": _summary(sys.modules[cls.__module__].__doc__),
            "cacheable": None if method is None else bool(method.frozen_encoders(("text", "image"))),
            "baseline": bool(cls.baseline),
            "options": {option: _as_json(defaults[option]) for option in fields if option not in required},
            "required": required,
            "origin": origin,
        }


def _as_json(value: Any) -> Any:
    """A default of an option; as text where JSON has no such value."""
    from pydantic_core import to_jsonable_python

    try:
        plain = to_jsonable_python(value)
        json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return visible(repr(value))
    return plain


def _show_methods(rows: list[dict[str, Any]]) -> None:
    """Print each method with its options as a matrix sets them, and the defaults."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        if "fault" in row:
            table.add_row(row["name"], Text(f"cannot be used: {visible(row['fault'])}", "red"))
            continue
        table.add_row(row["name"], f"{row['what']}{' (can be cached)' if row['cacheable'] else ''}")
        options = [f"{option}={_toml(value)}" for option, value in row["options"].items()]
        if options or row["required"]:
            table.add_row("", Text(escaped(", ".join([*row["required"], *options])), "dim"))
    console = PlainConsole()
    console.print(table)
    console.print(
        '\nIn a matrix: methods = ["fft", { name = "lora", rank = 4 }]', "\nMore of one:  tpme list methods lora"
    )


def _show_method(row: dict[str, Any], cls: type[Method]) -> None:
    """Print a method's formula and source, and its options with their defaults and what they take."""
    from rich.table import Table
    from rich.text import Text

    console = PlainConsole()
    console.print(Text(row["name"], "bold"), f"({row['origin']})")
    console.print(_paragraphs(cls.__doc__))
    if row["cacheable"]:
        console.print("\nCan be cached: it leaves encoders frozen.")
    if not row["options"] and not row["required"]:
        console.print("\nNo options.\n")
        return
    console.print("\nOptions:", _paragraphs(cls.Config.__doc__), "\n")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("option", "default", "takes"):
        table.add_column(column, overflow="fold")
    schema = _schema(cls)
    for option in row["required"]:
        table.add_row(option, "(required)", _takes(schema.get(option, {})))
    for option, value in row["options"].items():
        table.add_row(option, _toml(value), _takes(schema.get(option, {})))
    console.print(table, "")


def _schema(cls: type[Method]) -> dict[str, Any]:
    """The JSON schema of each option; empty where JSON cannot describe them."""
    from pydantic.errors import PydanticUserError

    try:
        properties: dict[str, Any] = cls.Config.model_json_schema()["properties"]
    except PydanticUserError:
        return {}
    return properties


def _toml(value: Any) -> str:
    """A value as TOML, without spaces, which break lines; TOML has no word for None."""
    return "none" if value is None else json.dumps(value, separators=(",", ":"))


def _takes(schema: dict[str, Any]) -> str:
    """What an option takes, by its JSON schema: ``integer > 0``, ``"relu" or "gelu"``."""
    if "anyOf" in schema:
        return " or ".join(_takes(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    kind = {"array": "list", "null": "none"}.get(schema.get("type", "any"), schema.get("type", "any"))
    items = f" of {_takes(schema['items'])}" if kind == "list" and schema.get("items") else ""
    return f"{kind}{items} {' and '.join(bounds)}".strip()


def _paragraphs(docstring: str | None) -> str:
    """A docstring without its line breaks, those between paragraphs and before ``Source:`` and its like aside."""
    return re.sub(r"(?<!\n)\n(?!\n|[A-Z][a-z]+: ) *", " ", inspect.cleandoc(docstring or ""))


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as a table for people or as JSON."""
    from rich.table import Table

    if as_json:
        print_json(json.dumps(rows, indent=1))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = list(rows[0])
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    PlainConsole().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _summary(docstring: str | None) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")
