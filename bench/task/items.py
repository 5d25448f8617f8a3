"""Items on their way through the model: what is read of an encoder, and the tensors of a set of items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from tpme.bench.record import Modality


@dataclass(frozen=True)
class Reads:
    """Which hidden states of one encoder an item encoder uses; always of token 0.

    ``levels`` index the L+1 hidden states of an L-layer encoder: 0 is the embedding output, i the output of layer
    i-1. ``final`` is the encoder's last hidden state after its final norm, where it has one (a ViT; a BERT's last
    hidden state is level L already).
    """

    levels: tuple[int, ...] = ()
    final: bool = False

    @property
    def count(self) -> int:
        """How many states are read of each item."""
        return len(self.levels) + self.final


LAST = Reads(final=True)
"""The default of every method that adapts the encoders: token 0 of the last hidden state."""


@dataclass(frozen=True)
class EncoderShape:
    """What a method must know of an encoder to build its own parts, also where only cached states are at hand."""

    width: int
    depth: int


@dataclass(frozen=True)
class Items:
    """A set of n items, ready for the device. Absent modalities are ``None``.

    ids: (n,) int64, 0 is padding. tokens, token_mask: (n, T) int64. image: (n, 3, H, W) uint8, as it lies on disk;
    it is normalised on the device. states: cached hidden states per modality, (n, levels, width). tables: those of the
    whole catalogue, (N+1, levels, width), where they lie on the device: states are looked up once the ids are there.
    """

    ids: Tensor
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    image: Tensor | None = None
    states: dict[Modality, Tensor] | None = None
    tables: dict[Modality, Tensor] | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def to(self, device: torch.device) -> Items:
        """Copy to ``device``; from pinned memory the host does not wait for it."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True)).looked_up()

    def looked_up(self) -> Items:
        """With states in place of tables."""
        if self.tables is None:
            return self
        states = {modality: table.index_select(0, self.ids) for modality, table in self.tables.items()}
        return replace(self, states=states, tables=None)


T = TypeVar("T")


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """``value`` with ``change`` applied to every tensor in it: through dataclasses and dicts, other values kept."""
    if isinstance(value, Tensor):
        return cast(T, change(value))
    if isinstance(value, dict):
        return cast(T, {key: map_tensors(entry, change) for key, entry in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: map_tensors(getattr(value, field.name), change) for field in fields(value)}
        )
    return value
