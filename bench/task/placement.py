"""Where the states of all items are kept during training: on the GPU, in host memory, or in their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from tpme.bench.record import Modality
from tpme.bench.task.items import States, map_tensors, size_bytes
from tpme.bench.task.precomputed import MappedStates

Placement = Literal["device", "pinned", "unpinned", "host", "mapped"]
PLACES: dict[Placement, str] = {
    "device": "GPU memory",
    "pinned": "page-locked host memory",
    "unpinned": "host memory, which could not be page-locked",
    "host": "host memory",
    "mapped": "a memory map of their files",
}
"""Location of the states during training."""

Table = States | MappedStates
"""States of all items, (N+1, levels, width): a cache, or a file of precomputed states."""


def table_bytes(table: Table) -> int:
    """Bytes of the states in ``table``."""
    return table.bytes if isinstance(table, MappedStates) else size_bytes(table)


def place(mapped: Mapping[Modality, Table], device: torch.device) -> tuple[dict[Modality, Table], Placement]:
    """Move memory-mapped tables to where training reads them fastest; returns them and their placement.

    On the GPU if they fit into half of its free memory; else in host memory if they fit into half of what is
    available, page-locked for a GPU where the system allows it; else they stay mapped.
    """
    placement = _placement(sum(map(table_bytes, mapped.values())), device)
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
    import psutil

    cuda = device.type == "cuda"
    if cuda and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    if size <= psutil.virtual_memory().available // 2:
        return "pinned" if cuda else "host"
    return "mapped"
