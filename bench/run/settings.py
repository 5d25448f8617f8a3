"""The keys of a matrix: laying ``--set`` over a file, and what a key that does not exist may have meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tpme.bench.errors import UserError, first_problem, nearest
from tpme.bench.parsing import DEEPEST, TomlSyntaxError, parse_toml

_TAGS = {"table", "number"}
"""Parts of a path in an error that are no keys: the alternatives of a learning rate."""


def apply_setting(raw: dict[str, Any], setting: str) -> None:
    """Lay ``setting`` (``"training.epochs=2"``) over the tables of a TOML file; raises UserError where it cannot."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"--set {setting}: write it as key=value, for example training.epochs=2")
    keys = key.strip().split(".")
    if len(keys) > DEEPEST:
        raise UserError(f"--set {setting}: a key of more than {DEEPEST} parts")
    try:
        _assign(raw, keys, _value(text.strip(), f"--set {key}"))
    except (IndexError, TypeError, ValueError):
        raise UserError(f"--set {setting}: no such setting in the matrix") from None


def _value(text: str, where: str) -> Any:
    """A TOML value; text that is none is taken as it is, in a list too, because a shell removes the quotes."""
    try:
        return parse_toml(f"value = {text}", where)["value"]
    except TomlSyntaxError:
        if not (text.startswith("[") and text.endswith("]")) or "[" in text[1:]:
            return text
        return [_value(word.strip(), where) for word in text[1:-1].split(",")]


def _assign(place: Any, keys: list[str], value: Any) -> None:
    """Set a nested key; a key into a list of tables goes into every one of them, a number into that one.

    Raises IndexError, TypeError or ValueError where there is no such place.
    """
    key, rest = keys[0], keys[1:]
    if isinstance(place, list) and not key.isdigit():
        for entry in place:
            _assign(entry, keys, value)
        return
    if not isinstance(place, dict | list):
        raise TypeError(key)
    index: Any = int(key) if isinstance(place, list) else key
    if rest:
        _assign(place[index] if isinstance(place, list) else place.setdefault(index, {}), rest, value)
    else:
        place[index] = value


def problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake in a matrix in one line, with the key that an unknown one may stand for."""
    field, message, kind = first_problem(error)
    if kind == "extra_forbidden":
        message = "no such setting" + _hint(_keys(field), model)
    elif kind == "model_type":
        below = [*_keys(field), ""]
        message = "this is a table" + _hint(below, model)
    elif kind == "tuple_type":
        message = "this is a list, in square brackets"
    return f"{field or 'the matrix'}: {message}"


def culprit(error: ValidationError, settings: Sequence[str]) -> str | None:
    """The one of ``settings`` (``"training.epoch=2"``) that sets the first wrong field; None: the file does."""
    wrong = _keys(first_problem(error).field)
    return next((setting for setting in settings if _keys(setting.partition("=")[0]) == wrong), None)


def _keys(field: str) -> list[str]:
    """A dotted path without places in lists and tags of alternatives."""
    return [part.strip() for part in field.split(".") if not part.strip().isdigit() and part not in _TAGS]


def _hint(unknown: Sequence[str], model: type[BaseModel]) -> str:
    """The nearest key beside an unknown one, else the key of that name elsewhere, else the keys beside it."""
    known = list(known_keys(model))
    parent, word = ".".join(unknown[:-1]), unknown[-1] if unknown else ""
    beside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    if near := nearest(word, beside):
        return f"; did you mean {'.'.join(filter(None, [parent, near]))}?"
    if near := nearest(word, [key.rpartition(".")[2] for key in known]):
        return f"; did you mean {next(key for key in known if key.rpartition('.')[2] == near)}?"
    return f"; known: {', '.join(beside)}" if beside else ""


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a model as a dotted path, those of the tables in it included; tables before what is in them."""
    yield from (f"{prefix}{name}" for name in model.model_fields)
    for name, field in model.model_fields.items():
        for table in _tables(field.annotation):
            yield from known_keys(table, f"{prefix}{name}.")


def _tables(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models within a type, such as that of ``tuple[Model, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _tables(part)
