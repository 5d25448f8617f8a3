"""What the launcher hands to the process of one cell, and how the two talk."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tpme.bench.record import Cell, Frozen


class Job(Frozen):
    """One attempt at one cell: what to run, on which files, and where the record goes."""

    cell: Cell
    cell_id: str
    attempt: int
    code_version: str
    dataset_path: Path
    store: Path
    folder: Path
    """The folder of the cell: records, ranks, samples and logs of its attempts."""
    methods_path: tuple[Path, ...] = ()
    cache_limit_bytes: int

    def file(self, suffix: str) -> Path:
        """``attempt-N`` + ``suffix`` in the cell's folder."""
        return self.folder / f"attempt-{self.attempt}{suffix}"


def progress_line(what: str, share: float) -> str:
    """One progress event, as the cell writes it to its standard output."""
    return json.dumps({"what": what, "share": round(share, 4)})


def parse_progress(line: str) -> tuple[str, float] | None:
    """The event of a line, or ``None`` for a line that is none."""
    try:
        event: Any = json.loads(line)
        return str(event["what"]), float(event["share"])
    except (ValueError, KeyError, TypeError):
        return None


def code_version(method_files: list[Path]) -> str:
    """Version of the measured code: 12 hex digits over the sources of task, loop, instruments and methods.

    Reports, the command line and documentation may change without making results stale.
    """
    bench = Path(str(files("tpme.bench")))
    sources = [
        bench / "cell.py",
        *(path for part in ("task", "train", "measure") for path in (bench / part).rglob("*.py")),
    ]
    sources += Path(str(files("tpme.methods"))).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted({*sources, *method_files}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
