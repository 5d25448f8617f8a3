"""Whether prepared data and caches on disk still are what they were: a checksum of their content.

Content is read once and again after a change: what was read is remembered with size, times of change and inode of
every file, so that a data set of any size is checked in less than a millisecond.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpme.bench.errors import UserError
from tpme.bench.parsing import open_regular, read_json
from tpme.bench.writing import write_atomically

_CHUNK = 2**20
_TICK_NS = 10**9
"""A file changed twice within a tick of the file system's clock has the same times; a second covers all of them."""


def is_unchanged(paths: Sequence[Path], expected: str, digest: Callable[[], str], memory: Path) -> bool:
    """Whether the content of ``paths`` still has the checksum ``expected``.

    Args:
        paths: existing files. digest: reads them; not called where no file has changed since it gave ``expected``.
        memory: file that remembers that, replaced as needed; without it, or where it cannot be written, all is read.
    """
    stamps = _stamps(paths)
    try:
        if read_json(memory) == [expected, stamps]:
            return True
    except (FileNotFoundError, UserError):
        pass
    if digest() != expected:
        return False
    newest = max(max(times) for _, *times, _ in stamps.values())
    if _stamps(paths) == stamps and not 0 <= time.time_ns() - newest < _TICK_NS:
        with contextlib.suppress(OSError):
            write_atomically(memory, json.dumps([expected, stamps]).encode())
    return True


def _stamps(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Size, times of the last change of content and of status (ns), and inode of each file, by its name."""
    facts = {path.name: path.stat() for path in paths}
    return {name: [f.st_size, f.st_mtime_ns, f.st_ctime_ns, f.st_ino] for name, f in facts.items()}


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file's content, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ContentDigest:
    """SHA-256 over the files of a prepared data set, added in the order of their names, images before arrays."""

    def __init__(self, format_version: int, max_seq_len: int) -> None:
        header = {"format": format_version, "max_seq_len": max_seq_len}
        self._digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        self.update = self._digest.update

    def begin_file(self, name: str, size: int) -> None:
        """Announce a file of ``size`` bytes, whose content is to follow by ``update``."""
        self.update(f"\n{name} {size}\n".encode())

    def begin_array(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Announce an array, whose values are to follow by ``update``."""
        self.update(f"\n{name} {dtype.str} {shape}\n".encode())

    def add_file(self, path: Path) -> None:
        """Add a whole file."""
        self.begin_file(path.name, path.stat().st_size)
        self._read(path, 0)

    def add_array(self, path: Path) -> None:
        """Add a whole ``.npy`` file."""
        open_regular(path).close()
        array = np.lib.format.open_memmap(path, mode="r")
        if not array.flags.c_contiguous:
            raise ValueError(f"{path.name} is in Fortran order")
        self.begin_array(path.stem, array.dtype, array.shape)
        self._read(path, array.offset)

    def _read(self, path: Path, offset: int) -> None:
        with open_regular(path) as file:  # not through a memory map, whose pages would count as memory of the process
            file.seek(offset)
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                self.update(chunk)

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._digest.hexdigest()
