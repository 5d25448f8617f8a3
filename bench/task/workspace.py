"""Publishes a folder atomically: it is built in a locked folder beside its destination and then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tpme.bench.errors import UserError
from tpme.bench.owner_lock import owned
from tpme.bench.writing import make_folder, sync_folder


@contextmanager
def workspace(destination: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Provide an empty folder beside ``destination`` to build in, and always remove it at the end.

    One process at a time may build for a destination; others call ``waiting`` and wait. A lock ends with its process;
    files left by a killed process are removed by the next one. Where machines share the folder, a second lock keeps
    those of the others away (``tpme.bench.owner_lock``).

    Raises:
        UserError: the folder cannot be created.
    """
    folder = building_folder(destination)
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link, and the folder that it leads to would be emptied; delete the link")
    with owned(destination.parent / f".{destination.name}.owner", waiting=waiting):
        lock = _locked(folder, destination, waiting)
        try:
            previous = folder / "previous"
            if previous.exists() and not destination.exists():
                previous.rename(destination)  # the previous process was killed in publish()
            _clear(folder)
            yield folder
        except OSError as error:
            if error.filename is None:  # a full disk
                raise OSError(error.errno, error.strerror, str(destination)) from None
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it ends with this process, too
                lock.release()


def building_folder(destination: Path) -> Path:
    """The folder in which ``destination`` is built."""
    return destination.parent / f".{destination.name}.preparing"


def publish(folder: Path, destination: Path, *, replace: bool) -> None:
    """Move the finished ``folder`` from the workspace to ``destination``.

    Raises:
        UserError: ``destination`` exists by now, and ``replace`` is not set.
    """
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # else a system crash may keep the name and lose the content
        os.close(handle)
    sync_folder(folder)
    if replace and destination.exists():
        destination.rename(folder.parent / "previous")
    try:
        folder.rename(destination)
    except OSError as error:
        raise UserError(f"{destination}: cannot be moved there ({error.strerror})") from None
    sync_folder(destination.parent)


def _locked(folder: Path, destination: Path, waiting: Callable[[], None]) -> FileLock:
    lock = FileLock(folder / "lock")
    while True:
        try:
            make_folder(folder)
            if _take(lock, waiting):
                return lock
        except OSError as error:
            raise UserError(f"{destination}: cannot be written ({error.strerror}: {error.filename})") from None


def _take(lock: FileLock, waiting: Callable[[], None]) -> bool:
    """Wait for the lock; returns whether it was there: its holder may just have removed the folder."""
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
    except FileNotFoundError:
        return False
    return True


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
