"""Types of settings: numbers as TOML writes them, no ``true`` and no ``"3"``, within what any machine could run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, Strict

from tpme.bench.errors import UserError

Size = Annotated[int, Strict(), Field(gt=0, le=2**20)]
"""Of a dimension, a batch or a text."""
ImageSize = Annotated[int, Strict(), Field(gt=0, le=2**12)]
"""Side of an image in pixels."""
Number = Annotated[int, Strict(), Field(gt=0, le=10**9)]
"""Of epochs, steps, users, items or seconds."""
Bytes = Annotated[int, Strict(), Field(gt=0, lt=2**63)]
Positive = Annotated[float, Strict(), Field(gt=0)]
"""A rate."""
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
"""What torch and NumPy take alike."""
Switch = Annotated[bool, Strict()]


def expanded(path: Path) -> Path:
    """The path with ``~`` filled in; raises UserError for the home of an unknown user."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: not a path: {error}") from None


def resolved(path: Path) -> Path:
    """The absolute path without links, ``~`` filled in; raises UserError where there is none."""
    try:
        return expanded(path).resolve()
    except (RuntimeError, OSError, ValueError) as error:  # links in a circle, NUL
        raise UserError(f"{path}: not a path: {error}") from None


def _check_path(path: Path) -> Path:
    try:
        resolved(path)
    except UserError as error:
        raise ValueError(str(error)) from None
    return path


LocalPath = Annotated[Path, AfterValidator(_check_path)]
"""A path that can be one: no NUL, no home of an unknown user, no links in a circle."""
