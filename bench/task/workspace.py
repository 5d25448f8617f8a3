"""Make a folder appear all at once: build it in a locked folder beside its place, then rename it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tpme.bench.errors import UserError


@contextmanager
def workspace(destination: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """An empty folder beside ``destination`` to build in; it is always removed at the end.

    One process at a time may build for one destination; any other calls ``waiting`` and waits. The lock dies with
    its process; the next one clears what an interrupted or killed one left behind.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = destination.parent / f".{destination.name}.preparing"
    lock = _locked(folder, destination, waiting)
    try:
        previous = folder / "previous"
        if previous.exists() and not destination.exists():
            previous.rename(destination)  # killed in the middle of publish()
        _clear(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def publish(folder: Path, destination: Path, *, replace: bool) -> None:
    """Move the finished ``folder``, which is in the workspace, to ``destination``.

    Raises:
        UserError: something has appeared there meanwhile, and ``replace`` is not set.
    """
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # else a crash of the machine may leave the name and lose the content
        os.close(handle)
    if replace and destination.exists():
        destination.rename(folder.parent / "previous")
    try:
        folder.rename(destination)
    except OSError as error:
        raise UserError(f"{destination}: cannot be put there ({error.strerror})") from None


def _locked(folder: Path, destination: Path, waiting: Callable[[], None]) -> FileLock:
    lock = FileLock(folder / "lock")
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire()
            return lock
        except FileNotFoundError:
            continue  # its holder has just removed the folder
        except OSError as error:
            raise UserError(f"{destination}: cannot be written ({error.strerror}: {error.filename})") from None


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
