"""Precomputed hidden states in place of an encoder: ``source = "states:FILE"`` names a table with a row per item.

The states (N, D), or K of them (N, K, D), come from a frozen model outside this package, whatever its input. They are
numbered like an encoder's: levels 0 to K-1, and the last one is also the final state.

====================  =============================================================================================
``FILE.npy``          float16 or float32; a row for each line of the prepared data set's ``items.txt``, in that order
``FILE.safetensors``  tensor ``states``, also bfloat16. Its metadata may hold ``items``, a JSON list that names the
                      item of each row as the source does; then order does not matter, and further rows are ignored
====================  =============================================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.errors import UserError, one_line
from tpme.bench.limits import expanded
from tpme.bench.parsing import open_regular
from tpme.bench.record import EncoderFacts, EncoderSpec
from tpme.bench.task.items import EncoderShape, Reads

_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
"""By their names in the two formats."""
_BITS: dict[torch.dtype, tuple[type[np.signedinteger[Any]], torch.dtype]] = {
    torch.float16: (np.int16, torch.int16),
    torch.bfloat16: (np.int16, torch.int16),
    torch.float32: (np.int32, torch.int32),
}
"""Integers of the same size: numpy knows no bfloat16, and rows are only copied."""
_ROWS_PER_CHUNK = 4096


@dataclass(frozen=True)
class MappedStates:
    """States of all items, memory-mapped: (N+1, levels, width), zeros for item 0.

    bits: (R, K, width), the file. rows: (N+1,), the row of each item. levels: those of the K states that are read.
    """

    bits: NDArray[np.signedinteger[Any]]
    dtype: torch.dtype
    rows: NDArray[np.int64]
    levels: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        """Size of the states that are read, of all items."""
        return len(self.rows) * len(self.levels) * int(self.bits[0, 0].nbytes)

    def take(self, ids: NDArray[np.int64], *, pin: bool = False) -> Tensor:
        """The states of items ``ids`` (n,), on the host: (n, levels, width)."""
        _, states, width = self.bits.shape
        index = self.rows[ids][:, None] * states + self.levels
        taken = torch.empty((*index.shape, width), dtype=self.dtype, pin_memory=pin)
        out = taken.view(_BITS[self.dtype][1]).numpy()
        np.take(self.bits.reshape(-1, width), index, axis=0, out=out, mode="clip")
        out[ids == 0] = 0
        return taken

    def whole(self, device: torch.device) -> Tensor:
        """A copy of all of them on ``device``."""
        table = torch.empty((len(self.rows), len(self.levels), self.bits.shape[2]), dtype=self.dtype, device=device)
        for start in range(0, len(self.rows), _ROWS_PER_CHUNK):
            ids = np.arange(start, min(start + _ROWS_PER_CHUNK, len(self.rows)))
            table[start : start + len(ids)] = self.take(ids)
        return table


@dataclass(frozen=True)
class StatesFile:
    """A file of precomputed states, of which only the header has been read.

    size: (R, K, width). offset: where the values begin, in bytes. items: name of each row's item; ``None``: those of
    the data set.
    """

    path: Path
    size: tuple[int, int, int]
    dtype: torch.dtype
    offset: int
    items: list[str] | None

    @classmethod
    def open(cls, spec: EncoderSpec) -> StatesFile:
        """Read the header of the file that ``spec`` names.

        Raises UserError where there is none, its format, shape or type is another, or ``spec`` has options that only
        an encoder has.
        """
        if spec != EncoderSpec(source=spec.source, revision=spec.revision):
            raise UserError(f"encoder '{spec.source}': precomputed states take no options besides source")
        path = expanded(Path(spec.source.removeprefix("states:")))
        read = {".npy": _npy_header, ".safetensors": _safetensors_header}.get(path.suffix)
        if read is None:
            raise UserError(f"{path}: precomputed states are read from .npy or .safetensors files")
        try:
            open_regular(path).close()
            shape, dtype, offset, items = read(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file of precomputed states") from None
        except UserError:
            raise
        except Exception as error:  # NumPy, safetensors and json raise many for broken files
            raise UserError(f"{path}: not readable as precomputed states ({one_line(error)})") from None
        if dtype not in _DTYPES:
            raise UserError(f"{path}: its states are {dtype}; save them as float16 or float32")
        if len(shape) not in (2, 3) or 0 in shape:
            raise UserError(f"{path}: its states are of shape {shape}; save (items, width) or (items, states, width)")
        rows, *states, width = shape
        if items is not None and (len(items) != rows or len(set(items)) != rows):
            raise UserError(f"{path}: its metadata name {len(set(items))} different items for {rows} rows")
        return cls(path, (rows, states[0] if states else 1, width), _DTYPES[dtype], offset, items)

    @property
    def shape(self) -> EncoderShape:
        """Width, and depth K-1: an encoder of L layers has L+1 hidden states."""
        return EncoderShape(width=self.size[2], depth=self.size[1] - 1)

    def facts(self, spec: EncoderSpec) -> EncoderFacts:
        """What a record says of them."""
        return EncoderFacts(
            source=spec.source,
            revision=spec.revision,
            architecture="states",
            weights="pretrained",
            width=self.shape.width,
            depth=self.shape.depth,
            parameters=0,
        )

    @cached_property
    def _bits(self) -> NDArray[np.signedinteger[Any]]:
        return np.memmap(self.path, _BITS[self.dtype][0], "r", self.offset, self.size)

    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_values(self) -> None:
        """Raise UserError where a value is not finite."""
        for start in range(0, self.size[0], _ROWS_PER_CHUNK):
            chunk = torch.from_numpy(np.array(self._bits[start : start + _ROWS_PER_CHUNK])).view(self.dtype)
            finite = chunk.isfinite().flatten(1).all(dim=1)
            if not bool(finite.all()):
                row = start + int((~finite).nonzero()[0])
                raise UserError(f"{self.path}: row {row} holds a value that is not finite")

    def rows_of(self, names: Sequence[str]) -> NDArray[np.int64]:
        """The row of each item, (N+1,), of a data set with these item ``names`` (N+1); 0 for padding, item 0.

        Raises UserError where an item has none.
        """
        items, rows = len(names) - 1, self.size[0]
        if self.items is None:
            if rows != items:
                raise UserError(
                    f"{self.path}: {rows:,} rows for a data set of {items:,} items; save one for each line of its "
                    "items.txt, in that order, or name the items in the metadata of a .safetensors file"
                )
            return np.concatenate([[0], np.arange(items)])
        row_of = {name: row for row, name in enumerate(self.items)}
        lacking = [name for name in names[1:] if name not in row_of]
        if lacking:
            raise UserError(f"{self.path}: no states for {len(lacking):,} items of the data set (first: {lacking[0]})")
        return np.array([0, *(row_of[name] for name in names[1:])])

    def read(self, reads: Reads, names: Sequence[str]) -> MappedStates:
        """The states that an item encoder ``reads``, by item of a data set with these item ``names`` (N+1)."""
        levels = [*reads.levels, *([self.size[1] - 1] if reads.final else [])]
        return MappedStates(self._bits, self.dtype, self.rows_of(names), np.array(levels))


_Header = tuple[tuple[int, ...], str, int, list[str] | None]
"""Shape, name of the type, offset of the values, names of the items."""


def _npy_header(path: Path) -> _Header:
    array = np.lib.format.open_memmap(path, mode="r")
    if not array.flags.c_contiguous:
        raise ValueError("saved in Fortran order; save numpy.ascontiguousarray of it")
    return array.shape, str(array.dtype), array.offset, None


def _safetensors_header(path: Path) -> _Header:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # checks sizes and offsets
            pass
    except SafetensorError as error:
        raise ValueError(error) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    if "states" not in header:
        raise ValueError(f"no tensor 'states' in it, only {', '.join(sorted(set(header) - {'__metadata__'}))}")
    states, names = header["states"], header.get("__metadata__", {}).get("items")
    items = None if names is None else [str(name) for name in list(json.loads(names))]
    return tuple(states["shape"]), states["dtype"], 8 + length + states["data_offsets"][0], items
