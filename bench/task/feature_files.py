"""The files of a feature cache under construction.

Rows are appended with plain writes: memory stays bounded, and a full disk raises an error instead of crashing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import PositiveInt

from tpme.bench.record import Frozen, Seconds
from tpme.bench.writing import write_atomically

SAVE_EVERY_S = 10.0
"""An interrupted build loses at most this much work plus one chunk."""
PROGRESS = "progress.json"
_BLOCK = 2**20

Rows = Mapping[str, NDArray[Any]]
"""Rows of the tables of a cache, (n, ...) each, by the table's name."""


class BuildProgress(Frozen):
    """The content of ``PROGRESS``: what is synced to disk."""

    rows: PositiveInt
    spent_s: Seconds
    sha256: dict[str, str]
    """Of the first ``rows`` rows of each table, with its header."""


class Tables:
    """The tables of a cache under construction. Rows saved by an interrupted build are kept; later ones are cut off.

    Where the saved rows are not those that were written, the build starts anew (``started_anew``).

    Args:
        folder: existing folder of the cache. total: rows of the finished tables, N+1. first: row 0 of each table.
    """

    def __init__(self, folder: Path, total: int, first: Rows) -> None:
        self.folder, self.total, self.first = folder, total, first
        self.paths = {name: folder / f"{name}.npy" for name in first}
        self._progress = folder / PROGRESS
        self._hashes = {name: hashlib.sha256() for name in first}
        self.rows, self.spent_s = self._saved()
        self.started_anew = not self.rows and self._progress.exists()
        self._spent_before_s, self._saved_s = self.spent_s, 0.0

    def _saved(self) -> tuple[int, float]:
        """Rows and seconds of an interrupted build; zero if there is none, or its files are not what it has saved."""
        try:
            state = BuildProgress.model_validate_json(self._progress.read_bytes())
            hashes = {name: _hash_of(path, self._end(name, state.rows)) for name, path in self.paths.items()}
        except (OSError, ValueError):
            return 0, 0.0
        if state.rows > self.total or {name: digest.hexdigest() for name, digest in hashes.items()} != state.sha256:
            return 0, 0.0
        self._hashes = hashes
        return state.rows, state.spent_s

    def _end(self, name: str, rows: int) -> int:
        """Size of a file with ``rows`` rows."""
        return len(_header(self.first[name], self.total)) + rows * self.first[name].nbytes

    def __enter__(self) -> Tables:
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for name, path in self.paths.items():
            if not self.rows:
                path.unlink(missing_ok=True)  # another process may still map an older one
            file = self._stack.enter_context(path.open("r+b" if self.rows else "xb"))
            self._files[name] = file
            if self.rows:
                file.truncate(self._end(name, self.rows))
                file.seek(0, os.SEEK_END)
            else:
                self._write(name, _header(self.first[name], self.total))
        if not self.rows:
            self._progress.unlink(missing_ok=True)
            self.append(self.first)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, rows: Rows) -> None:
        """Append rows to every table."""
        for name, values in rows.items():
            self._write(name, values.tobytes())
        self.rows += len(next(iter(rows.values())))

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each table as it was written, by its name."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

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
        state = BuildProgress(rows=self.rows, spent_s=self.spent_s, sha256=self.digests())
        write_atomically(self._progress, state.model_dump_json().encode())


def forget_progress(folder: Path) -> None:
    """Remove the progress file of a finished cache, whose builder may have been killed before it could."""
    with contextlib.suppress(OSError):
        (folder / PROGRESS).unlink()


def _hash_of(path: Path, size: int) -> hashlib._Hash:
    """SHA-256 of the first ``size`` bytes of a file. Raises OSError, and ValueError where it is shorter."""
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while left:
            data = file.read(min(left, _BLOCK))
            if not data:
                raise ValueError(f"{path}: shorter than {size} bytes")
            digest.update(data)
            left -= len(data)
    return digest


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
