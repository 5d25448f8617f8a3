"""The files of a feature cache under construction.

Rows are appended with plain writes: memory stays bounded, and a full disk raises an error instead of crashing.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from tpme.bench.record import write_atomically

SAVE_EVERY_S = 10.0
"""An interrupted build loses at most this much work plus one chunk."""

Rows = Mapping[str, NDArray[Any]]
"""Rows of the tables of a cache, (n, ...) each, by the table's name."""


class Tables:
    """The tables of a cache under construction. Rows saved by an interrupted build are kept; later ones are cut off.

    Args:
        folder: existing folder of the cache. total: rows of the finished tables, N+1. first: row 0 of each table.
    """

    def __init__(self, folder: Path, total: int, first: Rows) -> None:
        self.folder, self.total, self.first = folder, total, first
        self.paths = {name: folder / f"{name}.npy" for name in first}
        self._progress = folder / "progress.json"
        self.rows, self.spent_s = self._saved()
        self._spent_before_s, self._saved_s = self.spent_s, 0.0

    def _saved(self) -> tuple[int, float]:
        """Rows and seconds of an interrupted build; zero if a file is missing or too short."""
        try:
            state = json.loads(self._progress.read_bytes())
            rows, spent_s = int(state["rows"]), float(state["spent_s"])
            whole = all(path.stat().st_size >= self._end(name, rows) for name, path in self.paths.items())
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0.0
        return (rows, spent_s) if whole else (0, 0.0)

    def _end(self, name: str, rows: int) -> int:
        """Size of a file with ``rows`` rows."""
        return len(_header(self.first[name], self.total)) + rows * self.first[name].nbytes

    def __enter__(self) -> Tables:
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for name, path in self.paths.items():
            file = self._stack.enter_context(path.open("r+b" if self.rows else "wb"))
            self._files[name] = file
            file.truncate(self._end(name, self.rows) if self.rows else 0)
            file.seek(0, os.SEEK_END)
            if not self.rows:
                file.write(_header(self.first[name], self.total))
        if not self.rows:
            self._progress.unlink(missing_ok=True)
            self.append(self.first)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, rows: Rows) -> None:
        """Append rows to every table."""
        for name, values in rows.items():
            self._files[name].write(values.tobytes())
        self.rows += len(next(iter(rows.values())))

    def save_if_due(self, spent_s: float) -> None:
        """Call ``save`` every SAVE_EVERY_S seconds."""
        if spent_s - self._saved_s >= SAVE_EVERY_S:
            self.save(spent_s)

    def save(self, spent_s: float) -> None:
        """Sync all rows to disk; ``spent_s`` is the time spent by this process."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._saved_s, self.spent_s = spent_s, self._spent_before_s + spent_s
        write_atomically(self._progress, json.dumps({"rows": self.rows, "spent_s": self.spent_s}).encode())


def _header(row: NDArray[Any], total: int) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": row.dtype.str, "fortran_order": False, "shape": (total, *row.shape[1:])}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and lock it for one builder; the lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        yield
