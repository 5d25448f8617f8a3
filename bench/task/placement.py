"""Where the states of all items are kept during training: on the GPU, in host memory, or in their files.

Where they do not fit there, several ranks spread them: each keeps the items that it then encodes (``ItemShard``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tpme.bench.record import Modality
from tpme.bench.task.dealing import Peers
from tpme.bench.task.items import States, map_tensors, named_tensors, size_bytes
from tpme.bench.task.precomputed import MappedStates

Placement = Literal["device", "device shards", "pinned", "unpinned", "host", "host shards", "mapped"]
PLACES: dict[Placement, str] = {
    "device": "GPU memory",
    "device shards": "GPU memory, each item on one of the devices",
    "pinned": "page-locked host memory",
    "unpinned": "host memory, which could not be page-locked",
    "host": "host memory",
    "host shards": "host memory, each item by one of the ranks",
    "mapped": "a memory map of their files",
}
"""Location of the states during training."""

Table = States | MappedStates
"""States of all items, (N+1, levels, width): a cache, or a file of precomputed states."""


def table_bytes(table: Table | ItemShard) -> int:
    """Bytes of the states in ``table``, of all items."""
    if isinstance(table, ItemShard):
        return table_bytes(table.whole)
    return table.bytes if isinstance(table, MappedStates) else size_bytes(table)


@dataclass(frozen=True)
class ItemShard:
    """The states of the items of one rank, of N: padding, then items r + 1, r + 1 + N and so on.

    own: theirs. whole: those of all items, in their files: read where this rank needs others.
    """

    own: States
    whole: Table
    rank: int
    size: int

    @classmethod
    def of(cls, table: Table, peers: Peers, device: torch.device, *, pin: bool = False) -> ItemShard:
        """This rank's part of a memory-mapped table, on ``device`` or in (page-locked) host memory."""
        items = len(table.rows) if isinstance(table, MappedStates) else len(next(iter(named_tensors(table).values())))
        ids = np.concatenate([[0], np.arange(peers.rank + 1, items, peers.size)])
        rows = table.take(ids) if isinstance(table, MappedStates) else map_tensors(table, lambda t: t[ids])
        own = map_tensors(rows, lambda t: t.pin_memory() if pin else t.to(device))
        return cls(own, table, peers.rank, peers.size)

    def locate(self, ids: NDArray[np.int64]) -> tuple[Table, NDArray[np.int64]]:
        """A table that holds the items ``ids`` (n,), and their rows in it."""
        if ((ids == 0) | (owners(ids, self.size) == self.rank)).all():
            return self.own, np.where(ids == 0, 0, 1 + (ids - 1) // self.size)
        return self.whole, ids


def owners(ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The rank, of ``size``, that keeps each item (n,); padding is everywhere."""
    return (ids - 1) % size


def place(
    mapped: Mapping[Modality, Table], device: torch.device, peers: Peers | None = None
) -> tuple[dict[Modality, Table | ItemShard], Placement]:
    """Move memory-mapped tables to where training reads them fastest; returns them and their placement.

    On the GPU if they fit into half of its free memory; else in host memory if they fit into half of what is
    available, page-locked for a GPU where the system allows it; else they stay mapped. Several ranks each keep all
    items, or where these do not fit there, their share of them; they are taken to share one host.
    """
    size = sum(map(table_bytes, mapped.values()))
    placement = _placement(size, device) if peers is None else _placement_of_ranks(size, device, peers)
    if peers is not None and placement in ("device shards", "host shards"):
        pin = placement == "host shards" and device.type == "cuda"
        at = device if placement == "device shards" else torch.device("cpu")
        return {modality: ItemShard.of(table, peers, at, pin=pin) for modality, table in mapped.items()}, placement
    if placement == "pinned":
        try:
            return {modality: _moved(table, placement, device) for modality, table in mapped.items()}, placement
        except RuntimeError:  # the system or the container limits locked memory
            placement = "unpinned"
    return {modality: _moved(table, placement, device) for modality, table in mapped.items()}, placement


def _moved(table: Table, placement: Placement, device: torch.device) -> Table:
    if placement == "mapped":
        return table
    if isinstance(table, MappedStates):
        copied = table.whole(device if placement == "device" else torch.device("cpu"))
        return copied.pin_memory() if placement == "pinned" else copied
    if placement == "device":
        return map_tensors(table, lambda tensor: tensor.to(device))
    return map_tensors(table, lambda tensor: tensor.pin_memory() if placement == "pinned" else tensor.clone())


def _placement(size: int, device: torch.device) -> Placement:
    if size <= _room(device):
        return "device"
    if size <= _room(None):
        return "pinned" if device.type == "cuda" else "host"
    return "mapped"


def _placement_of_ranks(size: int, device: torch.device, peers: Peers) -> Placement:
    """Where the tables of all ranks are: as that of the rank with the least room says."""
    room = torch.tensor([_room(device), _room(None)], device=device)
    on_device, on_host = peers.all_gather(room[None]).amin(0).tolist()
    cuda = device.type == "cuda"
    if size <= on_device:
        return "device"
    if size // peers.size <= on_device:
        return "device shards"
    if size * peers.size <= on_host:
        return "pinned" if cuda else "host"
    return "host shards" if size <= on_host else "mapped"


def _room(device: torch.device | None) -> int:
    """Half of the free memory of a GPU, none of a CPU as a device; half of what is available on the host."""
    import psutil

    if device is None:
        return int(psutil.virtual_memory().available // 2)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else -1
