"""The exception for mistakes of the user, and other errors in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError


LONGEST_MESSAGE = 400
"""Characters of the message of a failed cell."""


class UserError(Exception):
    """Bad input. The command line prints the message alone, without a traceback, and exits with code 2."""


class FieldProblem(NamedTuple):
    """What is wrong with a field."""

    field: str
    """Dotted path; empty for the whole."""
    message: str
    kind: str
    """Pydantic's name of the problem."""


def first_problem(error: ValidationError) -> FieldProblem:
    """The first field that ``error`` complains about; of a union, the alternative that fits furthest."""
    found = error.errors()
    # Pydantic puts the name of an alternative, such as ``tuple[int, ...]``, into the path.
    alternative = next((place for place, part in enumerate(found[0]["loc"]) if "[" in str(part)), None)
    alike = (
        found[:1]
        if alternative is None
        else [e for e in found if e["loc"][:alternative] == found[0]["loc"][:alternative]]
    )
    first = max(alike, key=lambda each: len(each["loc"]))
    field = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    return FieldProblem(field, first["msg"].removeprefix("Value error, "), first["type"])


def one_line(error: BaseException, length: int = 200) -> str:
    """Kind and message of an error, the message cut to ``length``."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}".removesuffix(": ")
