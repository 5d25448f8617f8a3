"""The one way to read a TOML or JSON file from outside: a regular file of bounded size, depth and integers."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from tpme.bench.errors import UserError
from tpme.bench.text import visible

TOML_BYTES = 2**20
JSON_BYTES = 64 * 2**20
MOST_LISTS, MOST_VALUES = 2**20, 2**23
"""Of a JSON file: three bytes are an empty list, which takes a hundred in memory."""
DEEPEST = 64
"""Nested tables and lists; a matrix has 7 levels, a record 5."""
INTEGER_BITS = 64
"""Integers reach from -2^63 to 2^64 - 1."""
_PART = r"""(?:[\w-]++|"[^"\n]*"|'[^'\n]*')[ \t]*+"""
_DEEP_KEY = re.compile(rf"(?<![\w-]){_PART}(?:\.[ \t]*+{_PART}){{{DEEPEST}}}")
"""A dotted key of more parts than ``DEEPEST``; tomllib takes time and memory that grow with the square of them."""


class TomlSyntaxError(UserError):
    """A text that is not TOML, rather than TOML beyond the limits."""


def read_toml(path: Path, most_bytes: int = TOML_BYTES) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: not a regular file, too large, not TOML, nested too deep, an integer beyond 64 bits, NaN.
    """
    return parse_toml(_text(path, read_regular(path, most_bytes)), str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a text in TOML; raises UserError with ``where`` in front."""
    if deep := _DEEP_KEY.search(text):
        line = text.count("\n", 0, deep.start()) + 1
        raise UserError(f"{where}: line {line}: a key of more than {DEEPEST} parts")
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TomlSyntaxError(f"{where}: not a readable TOML file: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_reason(error)}") from None
    _check(value, where)
    return value


def read_json(path: Path, most_bytes: int = JSON_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: not a regular file, too large, not JSON, nested too deep, an integer beyond 64 bits, NaN.
    """
    return parse_json(_text(path, read_json_bytes(path, most_bytes)), str(path))


def read_json_bytes(path: Path, most_bytes: int = JSON_BYTES) -> bytes:
    """The bytes of a JSON file, as ``read_regular``, of which no parser makes more than a gigabyte."""
    data = read_regular(path, most_bytes)
    if data.count(b"[") + data.count(b"{") > MOST_LISTS or data.count(b",") > MOST_VALUES:
        raise UserError(f"{path}: more than {MOST_LISTS:,} tables and lists, or {MOST_VALUES:,} values")
    return data


def parse_json(text: str, where: str) -> Any:
    """The value of a text in JSON; raises UserError with ``where`` in front."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {_reason(error)}") from None
    _check(value, where)
    return value


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file of at most ``most_bytes``; raises as ``open_regular``."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, most_bytes) + 1)  # reserves as much as it is asked for
    if max(size, len(data)) > most_bytes:
        raise UserError(f"{path}: larger than {most_bytes / 2**20:g} MiB, the most that is read of such a file")
    return data


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, opened to read its bytes.

    Never waits: a FIFO or a device is refused. Raises FileNotFoundError, else UserError.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a regular file")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a path with NUL or a lone surrogate
        raise UserError(f"{path}: not a path: {error}") from None


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested deeper than {DEEPEST} levels"
    return str(error) if "digits" not in str(error) else f"an integer of more than {INTEGER_BITS} bits"


def _check(value: Any, where: str) -> None:
    """Raise UserError for what is nested deeper than ``DEEPEST``, large integers, and text that has no encoding."""
    level: list[tuple[str, Any]] = [(where, [value])]
    for _ in range(DEEPEST + 1):
        below: list[tuple[str, Any]] = []
        for place, entry in level:
            for name, inner in entry.items() if isinstance(entry, dict) else enumerate(entry):
                if isinstance(name, str):
                    _check_leaf(name, place)
                inside = f"{place}: {visible(name, 50)}" if place is where and isinstance(name, str) else place
                if isinstance(inner, dict | list):
                    below.append((inside, inner))
                else:
                    _check_leaf(inner, inside)
        if not below:
            return
        level = below
    raise UserError(f"{level[0][0]}: nested deeper than {DEEPEST} levels")


def _check_leaf(value: object, place: str) -> None:
    if isinstance(value, int) and not -(2 ** (INTEGER_BITS - 1)) <= value < 2**INTEGER_BITS:
        raise UserError(f"{place}: an integer of more than {INTEGER_BITS} bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place}: {value} is not a finite number")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{place}: text with a lone surrogate") from None
