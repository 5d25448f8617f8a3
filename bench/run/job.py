"""What the launcher hands to the process of one cell, and how the two talk."""

from __future__ import annotations

from pathlib import Path

from tpme.bench.record import Cell, Frozen


class Job(Frozen):
    """One attempt at one cell: what to run, on which files, and where the record goes."""

    cell: Cell
    cell_id: str
    attempt: int = 1
    code_version: str
    dataset_path: Path
    store: Path
    folder: Path
    """The folder of the cell: records, ranks, samples and logs of its attempts."""
    methods_path: tuple[Path, ...] = ()
    cache_limit_bytes: int
    time_limit_s: float
    save_adapters: bool = False
    """Write what the method has trained beside the record."""
    probe_items: int | None = None
    """Measure the representation space of the trained model on so many items."""

    @property
    def procedure(self) -> Path:
        """Folder of the finished parts of its procedure; they are forgotten when an attempt has ended well."""
        return self.folder / "procedure"

    def file(self, suffix: str) -> Path:
        """``attempt-N`` + ``suffix`` in the cell's folder."""
        return self.folder / f"attempt-{self.attempt}{suffix}"

    def log(self, rank: int = 0) -> Path:
        """The log of one of its processes; that of rank 0, often the only one, is the log of the attempt."""
        return self.file(f".rank-{rank}.log" if rank else ".log")


def time_limit_message(limit_s: float) -> str:
    """What the record of a cell says that took too long."""
    return f"took longer than its time limit of {limit_s:g} s; raise time_limit_s or --time-limit"
