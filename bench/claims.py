"""Folders that go with the process that made them, unless it keeps them: what a killed one leaves, the next removes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tpme.bench.lifetimes import end_orphans

_PREFIX = "tpme-"
"""Of the names of temporary folders."""
_CLAIM = ".claimed"
"""Locked by the living process that made the folder; not there once the folder is to be kept."""


@contextmanager
def claimed(make: Callable[[], Path], *, keep: bool) -> Iterator[tuple[Path, int]]:
    """A new folder and the open file of its lock, which the processes of cells may hold, too.

    Args:
        make: makes an empty folder, each time another one. keep: the folder stays unless the block raises.
    """
    folder, lock = _claim(make)
    try:
        yield folder, lock
        if keep:
            (folder / _CLAIM).unlink()
    finally:
        if (folder / _CLAIM).exists():
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def scratch_folder(purpose: str) -> Iterator[tuple[Path, int]]:
    """A temporary folder ``tpme-PURPOSE-...`` and the open file of its lock; those of killed processes are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-{'[a-z0-9_]' * 8}"):
        with contextlib.suppress(OSError):
            if left.lstat().st_uid == os.getuid():
                remove_unclaimed(left)
    with claimed(lambda: Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-")), keep=False) as claim:
        yield claim


def _claim(make: Callable[[], Path]) -> tuple[Path, int]:
    while True:
        folder = make()
        with contextlib.suppress(FileNotFoundError):  # somebody took it for one that was left
            lock = os.open(folder / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return folder, lock
            os.close(lock)


def remove_unclaimed(folder: Path) -> None:
    """Remove a folder of ``claimed`` whose process was killed, and kill what it started and left."""
    with contextlib.suppress(OSError):
        folder.rmdir()  # killed before it could claim it
    try:
        lock = os.open(folder / _CLAIM, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # else it was kept meanwhile
            end_orphans(lock)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its process lives, or nobody can tell
        pass
    finally:
        os.close(lock)
