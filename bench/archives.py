"""Members of zip archives and the arrays of ``.npz`` files, read without trusting what they declare."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpme.bench.errors import UserError, one_line
from tpme.bench.parsing import read_regular

_CHUNK = 4096
"""Bytes read at a time: LZMA and bzip2 unpack whatever they are given at once, up to 7,000 times as much."""


def read_member(archive: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    """The unpacked content of a member. Raises ValueError where it declares more than ``most_bytes``.

    A member that is longer than it declares is cut there, and its checksum fails (``zipfile.BadZipFile``); to read
    it at once would unpack all of it first.
    """
    member = archive.getinfo(name)
    if member.file_size > most_bytes:
        raise ValueError(f"'{name}' unpacks to {member.file_size:,} bytes, more than {most_bytes:,}")
    with archive.open(member) as file:
        return b"".join(iter(lambda: file.read(_CHUNK), b""))


def read_arrays(
    path: Path, names: Iterable[str], most_bytes: int, optional: Iterable[str] = ()
) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file by name, never pickled objects.

    Args:
        path: a regular file. names: of the arrays. most_bytes: that each may unpack to, and the file may have.
        optional: names of arrays that may be missing.

    Raises UserError where it is missing, damaged, too large, or lacks one of them.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(read_regular(path, most_bytes))) as file:
            there = set(file.namelist())
            wanted = (*names, *(name for name in optional if f"{name}.npy" in there))
            return {name: _array(read_member(file, f"{name}.npy", most_bytes)) for name in wanted}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}") from None
    except Exception as error:  # zipfile and the decompressors raise many
        raise UserError(f"{path}: not a readable .npz file ({one_line(error)})") from None


_NPY = re.compile(
    rb"\x93NUMPY\x01\0..{'descr': '([<>|=]?[biuf]\d{1,2})', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}),(?: (\d{1,18}))?\), } *\n",
    re.DOTALL,
)


def _array(data: bytes) -> NDArray[Any]:
    """What ``np.load`` reads, in a third of its time: a report opens a file for every cell, and they are short."""
    header = _NPY.match(data)
    if header is None:
        raise ValueError("it does not hold numbers in one or two dimensions")
    shape = tuple(int(size) for size in header.groups()[1:] if size is not None)
    values = np.frombuffer(data, header[1].decode(), offset=header.end())
    return values.reshape(shape).copy()
