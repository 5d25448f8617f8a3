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
    """The first field that ``error`` complains about."""
    first = error.errors()[0]
    return FieldProblem(".".join(map(str, first["loc"])), first["msg"], first["type"])


def one_line(error: BaseException, length: int = 200) -> str:
    """Kind and message of an error, the message cut to ``length``."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}".removesuffix(": ")
