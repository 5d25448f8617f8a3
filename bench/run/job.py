"""What the launcher hands to the process of one cell, and how the two talk."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

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
    time_limit_s: float

    def file(self, suffix: str) -> Path:
        """``attempt-N`` + ``suffix`` in the cell's folder."""
        return self.folder / f"attempt-{self.attempt}{suffix}"


def time_limit_message(limit_s: float) -> str:
    """What the record of a cell says that took too long."""
    return f"took longer than its time limit of {limit_s:g} s; raise time_limit_s or --time-limit"


def code_version(method_file: Path | None = None) -> str:
    """Version of the measured code: 12 hex digits over the sources of task, loop, instruments, counters and methods.

    Reports, the command line and documentation may change without making results stale. A method from elsewhere adds
    its own file, so that a change of it makes only its own cells stale.
    """
    bench = Path(str(files("tpme.bench")))
    sources = [bench / "run" / "cell.py", *Path(str(files("tpme.methods"))).rglob("*.py")]
    sources += [path for part in ("task", "train", "measure", "counting") for path in (bench / part).rglob("*.py")]
    if method_file is not None and method_file not in sources:
        sources.append(method_file)
    # Sorted by name and content, not by place: where something is installed does not matter.
    digests = sorted(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sources)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
