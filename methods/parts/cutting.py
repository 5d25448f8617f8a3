"""Cuts attention heads, feed-forward units and low-rank updates out of an encoder: its tensors become smaller.

What is cut gives the output that it would give with these heads' outputs, units' activations and updates set to zero.
Embeddings, norms and the width of the hidden states stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.task.families import Role
from tpme.bench.task.view import EncoderView
from tpme.methods.parts.scored_low_rank import MaskedInput, ScoredLowRank

_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
"""Where an attention module keeps its number of heads; those that keep none reshape to the width of a head."""
_BESIDE = ("pos_query_proj", "pos_key_proj")
"""Projections of relative positions to all heads (DeBERTa, where queries and keys do not project them, too)."""


@dataclass(frozen=True)
class Structure:
    """What is kept of an encoder with L layers; bool tensors on the host.

    heads: (L, G), a key-value head with the queries that share it. units: (L, F). ranks: (L, roles, r), of the
    low-rank updates; an update without ranks is removed.
    """

    heads: Tensor
    units: Tensor
    ranks: Tensor


def parts(view: EncoderView, roles: Sequence[Role]) -> list[tuple[str, Any]]:
    """The linear layers of these roles, or what wraps them, with their names; by layer, then by role."""
    return [(name, view.module.get_submodule(name)) for name in view.projections(*roles)]


def cut(view: EncoderView, kept: Structure, roles: Sequence[Role]) -> None:
    """Cut an encoder whose projections with ``roles`` have low-rank updates to ``kept``; masks are removed first."""
    for name, part in parts(view, ("attention_output", "ffn_out")):
        if isinstance(part, MaskedInput):
            view.module.set_submodule(name, part.inner)
    for layer in range(view.shape.depth):
        _cut_heads(view, layer, kept.heads[layer])
        _cut_units(view, layer, kept.units[layer])
    for (name, part), ranks in zip(parts(view, roles), kept.ranks.flatten(0, 1), strict=True):
        if not ranks.any():
            view.module.set_submodule(name, part.linear)
        else:
            part.keep_ranks(_index(ranks, part.down.device))


def _cut_heads(view: EncoderView, layer: int, kept: Tensor) -> None:
    """Keep key-value heads ``kept``, (G,) bool, with their queries."""
    if kept.all():
        return
    heads = view.heads
    shared = heads.number // heads.key_value
    queries = kept.repeat_interleave(shared * heads.width)
    keys = kept.repeat_interleave(heads.width)
    _keep(_part(view, layer, "query"), queries, 0)
    _keep(_part(view, layer, "key"), keys, 0)
    _keep(_part(view, layer, "value"), keys, 0)
    _keep(_part(view, layer, "attention_output"), queries, 1)
    attention: Any = view.module.get_submodule(view.projections("query")[layer].rpartition(".")[0])
    for name in _BESIDE:
        if hasattr(attention, name):
            _keep(getattr(attention, name), queries, 0)
    left = int(kept.sum()) * shared
    for name in _COUNTS:
        if hasattr(attention, name):
            setattr(attention, name, left)
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = left * heads.width
    if view.config.model_type == "mpnet":  # the encoder gives every layer the positions' bias of all heads
        device = next(attention.parameters()).device
        attention.register_buffer("_tpme_heads", _index(kept, device), persistent=False)
        attention.register_forward_pre_hook(_keep_bias)


def _keep_bias(attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give MPNet's attention the bias (n, heads, T, T) of the heads that it has."""
    hidden, mask, bias, *others = args
    return hidden, mask, bias.index_select(1, attention._tpme_heads), *others


def _cut_units(view: EncoderView, layer: int, kept: Tensor) -> None:
    """Keep feed-forward units ``kept``, (F,) bool."""
    if kept.all():
        return
    _keep(_part(view, layer, "ffn_in"), kept, 0)
    _keep(_part(view, layer, "ffn_out"), kept, 1)
    with suppress(UserError):  # most encoders have no gate
        _keep(_part(view, layer, "ffn_gate"), kept, 0)


def _part(view: EncoderView, layer: int, role: Role) -> Any:
    return view.module.get_submodule(view.projections(role)[layer])


def _keep(part: Any, kept: Tensor, dim: int) -> None:
    """Keep outputs (``dim`` 0) or inputs (1) of a linear layer, and of its low-rank update."""
    linear = part.linear if isinstance(part, ScoredLowRank) else part
    index = _index(kept, linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, index), requires_grad=False)
    if dim == 0:
        linear.out_features = len(index)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[index], requires_grad=False)
    else:
        linear.in_features = len(index)
    if isinstance(part, ScoredLowRank):
        if dim == 0:
            part.up = nn.Parameter(part.up.detach()[index])
        else:
            part.down = nn.Parameter(part.down.detach()[:, index])


def _index(kept: Tensor, device: torch.device) -> Tensor:
    """The places of true, (k,) int64, on ``device``; ``kept`` is on the host."""
    return kept.nonzero().flatten().to(device)
