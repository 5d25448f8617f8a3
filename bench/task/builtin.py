"""The encoders that ship with the package: their names, and where they lie."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tpme.bench.errors import UserError

BUILTIN = {"builtin:tiny-text": "text", "builtin:tiny-image": "image"}
"""Names as they stand in a matrix, and the folder of ``bench/task/tiny`` each lies in."""


def builtin_folder(source: str) -> Path:
    """The folder of a built-in encoder. Raises UserError for a name that is none."""
    if source not in BUILTIN:
        raise UserError(f"encoder '{source}': no such built-in encoder; there are {', '.join(sorted(BUILTIN))}")
    return Path(str(files("tpme.bench.task.tiny").joinpath(BUILTIN[source])))
