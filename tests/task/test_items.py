from __future__ import annotations

from dataclasses import dataclass

import torch

from tpme.bench.task.items import Items, Reads, map_tensors


@dataclass(frozen=True)
class Nested:
    items: Items
    name: str
    count: int


def test_reads_count_levels_and_the_final_state() -> None:
    assert (Reads((0, 2, 4)).count, Reads((1,), final=True).count, Reads(final=True).count) == (3, 2, 1)


def test_map_tensors_reaches_every_tensor_and_nothing_else() -> None:
    items = Items(torch.tensor([1, 2]), tokens=torch.ones(2, 3), states={"text": torch.ones(2, 1, 4)})
    changed = map_tensors(Nested(items, "x", 3), lambda tensor: tensor + 1)
    assert (changed.name, changed.count) == ("x", 3)
    assert changed.items.ids.tolist() == [2, 3]
    assert changed.items.tokens is not None
    assert changed.items.tokens.eq(2).all()
    assert changed.items.states is not None
    assert changed.items.states["text"].eq(2).all()
    assert changed.items.image is None
    assert items.ids.tolist() == [1, 2]


def test_states_on_the_device_are_looked_up_once_the_ids_are_there() -> None:
    table = torch.arange(24.0).reshape(4, 3, 2)
    moved = Items(torch.tensor([3, 0, 3]), tables={"text": table}).to(torch.device("cpu"))
    assert moved.tables is None
    assert moved.states is not None
    assert torch.equal(moved.states["text"], table[[3, 0, 3]])


def test_items_move_as_a_whole() -> None:
    moved = Items(torch.tensor([1, 2]), image=torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).to(torch.device("meta"))
    assert len(moved) == 2
    assert moved.image is not None
    assert (moved.ids.device.type, moved.image.device.type, moved.image.dtype) == ("meta", "meta", torch.uint8)
