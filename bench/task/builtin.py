"""Names and folders of the encoders that ship with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tpme.bench.errors import UserError

BUILTIN = {"builtin:tiny-text": "text", "builtin:tiny-image": "image"}
"""Name in a matrix -> folder in ``bench/task/tiny``."""


def builtin_folder(source: str) -> Path:
    """The folder of a built-in encoder. Raises UserError for an unknown name."""
    if source not in BUILTIN:
        raise UserError(f"encoder '{source}': no such built-in encoder; known: {', '.join(sorted(BUILTIN))}")
    return Path(str(files("tpme.bench.task.tiny").joinpath(BUILTIN[source])))
