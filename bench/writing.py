"""Writes files that readers see whole or not at all, and that outlast a power cut."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name beside ``path`` and rename it: readers see all of it or nothing.

    What is written outlasts a power cut. The temporary file is locked while its writer lives; one that is not is left
    of a killed writer, and removed by the next one of the same file.
    """
    try:
        make_folder(path.parent)
        with _temporary(path) as (handle, temporary):
            with open(handle, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            os.replace(temporary, path)  # noqa: PTH105
            sync_folder(path.parent)
    except OSError as error:  # that of a full disk names no file, any other the temporary one
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, str]]:
    """A locked temporary file beside ``path``, open for writing, and its name; it is gone afterwards."""
    # Other nodes may not see the locks of this one's writers.
    for left in () if "SLURM_JOB_ID" in os.environ else _temporaries(path):
        with contextlib.suppress(OSError):
            _remove_unlocked(left)
    mask = os.umask(0)
    os.umask(mask)
    while True:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not os.fstat(handle).st_nlink:  # another writer took it for one that is left
                continue
            os.fchmod(handle, 0o666 & ~mask)  # mkstemp's 0600 would hide records from everyone else
            yield handle, temporary
            return
        finally:
            Path(temporary).unlink(missing_ok=True)
            os.close(handle)


def _temporaries(path: Path) -> Iterator[Path]:
    """Temporary files of writers of ``path``, living or killed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    with contextlib.suppress(PermissionError):  # of a folder that one may write to and not list
        yield from (entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))


def _remove_unlocked(path: Path) -> None:
    """Remove a file that no process has locked. Raises OSError where one has, or the file system has no locks."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, whose names outlast a power cut; nothing where it exists."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in ``folder`` outlast a power cut, where the file system can and this user may."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(handle)
