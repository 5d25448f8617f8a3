"""Folders as chunks of bytes, for machines that share no file system: packed here, unpacked once on each node.

A parcel is named by its content. Chunks are all of one size, whatever the sizes of the files: memory stays bounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpme.bench.errors import UserError
from tpme.bench.parsing import open_regular
from tpme.bench.task.feature_files import locked
from tpme.bench.task.workspace import publish, workspace

CHUNK = 64 * 2**20
"""Bytes of a chunk; the last one has fewer."""
MANIFEST = "manifest.json"

Fetch = Callable[[Any], bytes]
"""Gives the bytes of a chunk."""


@dataclass(frozen=True)
class Parcel:
    """Files of one folder under way.

    name: of the folder on a node. sizes: of each file in bytes, by its path in the folder, in the order of the chunks.
    chunks: what ``Fetch`` takes, one for each.
    """

    name: str
    sizes: Mapping[str, int]
    chunks: tuple[Any, ...]


def file_sizes(folder: Path, files: Iterable[str]) -> dict[str, int]:
    """The sizes of ``files`` in ``folder``, in bytes."""
    return {file: (folder / file).stat().st_size for file in files}


def number_of_chunks(sizes: Mapping[str, int]) -> int:
    """Of ``read_chunks``."""
    return -(-sum(sizes.values()) // CHUNK)


def read_chunks(folder: Path, sizes: Mapping[str, int]) -> Iterator[bytes]:
    """The content of files, one after the other, in chunks. Raises UserError where one has become shorter."""
    chunk = bytearray()
    for name, size in sizes.items():
        with open_regular(folder / name) as file:
            left = size
            while left:
                read = file.read(min(left, CHUNK - len(chunk)))
                if not read:
                    raise UserError(f"{folder / name}: changed while it was read; run the matrix again")
                chunk += read
                left -= len(read)
                if len(chunk) == CHUNK:
                    yield bytes(chunk)
                    chunk.clear()
    if chunk:
        yield bytes(chunk)


def write_chunks(folder: Path, sizes: Mapping[str, int], chunks: Iterable[bytes]) -> None:
    """Write new files into ``folder`` from their chunks. Raises ValueError where these end too early."""
    folder.mkdir(parents=True, exist_ok=True)
    stream, rest = iter(chunks), memoryview(b"")
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            left = size
            while left:
                rest = rest or memoryview(next(stream, b""))
                if not rest:
                    raise ValueError(f"{name}: {left} bytes are missing")
                part, rest = rest[:left], rest[left:]
                file.write(part)
                left -= len(part)
            file.flush()
            os.fsync(file.fileno())


def unpack(parcel: Parcel, folder: Path, fetch: Fetch) -> Path:
    """The folder of a parcel below ``folder``, fetched by the first process that asks; others wait for it."""
    destination = folder / parcel.name
    if not destination.exists():
        with workspace(destination) as space:
            if not destination.exists():
                write_chunks(space / "new", parcel.sizes, map(fetch, parcel.chunks))
                publish(space / "new", destination, replace=False)
    return destination


def unpack_cache(parcel: Parcel, folder: Path, fetch: Fetch) -> None:
    """Put a finished feature cache into ``folder``, where none is; its manifest comes last."""
    if (folder / MANIFEST).exists():
        return
    with locked(folder), workspace(folder / "shipped") as space:
        if (folder / MANIFEST).exists():
            return
        write_chunks(space, parcel.sizes, map(fetch, parcel.chunks))
        for name in (*(name for name in parcel.sizes if name != MANIFEST), MANIFEST):
            (space / name).replace(folder / name)
