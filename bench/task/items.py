"""Items as input of the model: the hidden states to read of an encoder, and the tensors of a set of items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.record import Modality, Pool


@dataclass(frozen=True)
class Reads:
    """The hidden states that an item encoder uses of one encoder.

    ``levels`` index the L+1 hidden states of an L-layer encoder: 0 is the input of the first layer, i the output of
    layer i-1. ``final`` is the encoder's last hidden state after its final norm, where it has one (a ViT; a BERT's
    last hidden state is level L already).

    ``pool`` takes one vector of each state: the first, the mean or the last of the tokens that the mask keeps
    (``EncoderShape.pool`` names the right one). ``tokens = "all"`` keeps every token and the mask instead.
    """

    levels: tuple[int, ...] = ()
    final: bool = False
    pool: Pool = "first"
    tokens: Literal["pooled", "all"] = "pooled"

    @property
    def count(self) -> int:
        """Number of states read per item."""
        return len(self.levels) + self.final


@dataclass(frozen=True)
class TokenStates:
    """Hidden states of every token: states (n, levels, T, width), mask (n, T) bool, true for real tokens.

    Of an encoder whose method weights tokens (``EncoderView.reads_mask``), the mask holds their weights, as float.
    """

    states: Tensor
    mask: Tensor


States = Tensor | TokenStates
"""Hidden states as an item encoder gets them: (n, levels, width), or those of every token."""


def named_tensors(states: States) -> dict[str, Tensor]:
    """The tensors of ``states`` by name."""
    return {"states": states} if isinstance(states, Tensor) else dict(vars(states))


def size_bytes(states: States) -> int:
    """Bytes of all tensors of ``states``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in named_tensors(states).values())


@dataclass(frozen=True)
class EncoderShape:
    """Width and number of layers of an encoder: enough for a method to build its parts, also for cached states.

    pool: how this encoder's items are read unless a method says otherwise. pools: every way to read them.
    final_norm: the final state has passed a norm that level L has not.
    heads: attention heads of a layer; 1 for precomputed states, whose file does not say.
    """

    width: int
    depth: int
    pool: Pool = "first"
    pools: tuple[Pool, ...] = ("first", "mean", "last")
    final_norm: bool = False
    heads: int = 1

    def check(self, reads: Reads, encoder: str) -> None:
        """Raise UserError where ``reads`` takes a token of ``encoder`` that does not stand for the item."""
        if reads.tokens == "pooled" and reads.pool not in self.pools:
            raise UserError(
                f"{encoder}: it cannot be read with pool = '{reads.pool}', because that token does not represent the "
                f"item; choose {' or '.join(self.pools)}"
            )


@dataclass(frozen=True)
class Items:
    """The inputs of n items. Absent modalities are ``None``.

    ids: (n,) int64, 0 is padding. tokens, token_mask: (n, T) int64. image: (n, 3, H, W) uint8, as stored on disk;
    normalised on the device. states: hidden states per modality whose encoder does not run, (n, levels, width) or of
    every token. tables: those of all items, N+1 rows, if they are kept on the device: looked up there by id, or by
    ``table_rows`` (n,) if they are those of some items alone.
    """

    ids: Tensor
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    image: Tensor | None = None
    states: dict[Modality, States] | None = None
    tables: dict[Modality, States] | None = None
    table_rows: Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def to(self, device: torch.device) -> Items:
        """Copy to ``device``, asynchronously from pinned memory."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True)).looked_up()

    def looked_up(self) -> Items:
        """Replace tables by the states of these items."""
        if self.tables is None:
            return self
        rows = self.ids if self.table_rows is None else self.table_rows
        found = map_tensors(self.tables, lambda table: table.index_select(0, rows))
        return replace(self, states=(self.states or {}) | found, tables=None, table_rows=None)


T = TypeVar("T")


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Apply ``change`` to every tensor in ``value``, recursively in dataclasses and dicts; other values are kept."""
    if isinstance(value, Tensor):
        return cast(T, change(value))
    if isinstance(value, dict):
        return cast(T, {key: map_tensors(entry, change) for key, entry in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: map_tensors(getattr(value, field.name), change) for field in fields(value)}
        )
    return value
