"""The recommender: encoders -> item vectors -> sequential encoder -> user vectors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.dealing import WholeBatch
from tpme.bench.task.items import EncoderShape, Items, Reads, States, map_tensors
from tpme.bench.task.sequential import init_linear
from tpme.bench.task.view import EncoderView

ORDER: tuple[Modality, ...] = ("image", "text")
"""The order in which modalities are concatenated, everywhere (IISAN's)."""


_GROUPS = "_tpme_groups"
"""Attribute of a module: its own parameters' names -> learning-rate group. Unlike an attribute of a parameter, it
survives a deep copy."""


def group(module: nn.Module, name: str, parameters: Collection[str] | None = None) -> None:
    """Train parameters of ``module`` in the learning-rate group ``name``, wherever they are in the model.

    Args:
        module: of an encoder, the item encoder or the sequential encoder. name: one of the method's ``groups``, or
            ``recommender``, ``text``, ``image`` or ``method``. parameters: names of its own parameters; by default all
            below it. Later calls override earlier ones.
    """
    for part in module.modules() if parameters is None else (module,):
        names = [own for own, _ in part.named_parameters(recurse=False)] if parameters is None else parameters
        vars(part).setdefault(_GROUPS, {}).update(dict.fromkeys(names, name))


class ItemEncoder(nn.Module):
    """Maps an item's hidden states to its vector. Methods with a side network subclass it.

    ``reads``: the hidden states used of each encoder. ``group``: the learning rate of these parameters.
    """

    group: Literal["recommender", "method"] = "method"

    def __init__(self, reads: Mapping[Modality, Reads]) -> None:
        super().__init__()
        self.reads = dict(reads)

    def forward(self, states: Mapping[Modality, Any], ids: Tensor) -> Tensor:
        """Map states and item ids (n,) to item vectors (n, d).

        States are a Tensor (n, levels, width) per modality; ``TokenStates`` where ``reads`` asks for every token.
        """
        raise NotImplementedError


class TokenFusion(ItemEncoder):
    """The default: the last state of each encoder, pooled as it is meant to be read (``EncoderShape.pool``).

    ``gelu(W x)`` per modality, concatenated and projected to d.
    """

    group = "recommender"

    def __init__(self, shapes: Mapping[Modality, EncoderShape], dim: int) -> None:
        super().__init__({modality: Reads(final=True, pool=shape.pool) for modality, shape in shapes.items()})
        self.order = [modality for modality in ORDER if modality in shapes]
        self.heads = nn.ModuleDict({modality: nn.Linear(shapes[modality].width, dim) for modality in self.order})
        self.fusion = nn.Linear(dim * len(self.order), dim) if len(self.order) > 1 else nn.Identity()
        self.activation = nn.GELU()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        """Map final states, (n, 1, width) per modality, to item vectors (n, d)."""
        parts = [self.activation(self.heads[modality](states[modality][:, 0])) for modality in self.order]
        vectors: Tensor = self.fusion(torch.cat(parts, dim=1))
        return vectors


class Recommender(nn.Module):
    """Encoders, item encoder and sequential encoder of one cell.

    Args:
        views: the loaded encoders; without those whose states are cached.
        item_encoder: the method's, or ``TokenFusion``.
        sequence: the sequential encoder.
        frozen: modalities whose encoders stay unmodified; they run without gradients.

    ``whole``: what a method may do over the items of the whole batch, of which this process may encode a share.
    """

    def __init__(
        self,
        views: Mapping[Modality, EncoderView],
        item_encoder: ItemEncoder,
        sequence: nn.Module,
        *,
        frozen: Collection[Modality],
    ) -> None:
        super().__init__()
        self.views = dict(views)
        self.encoders = nn.ModuleDict({modality: view.module for modality, view in views.items()})
        self.item_encoder = item_encoder
        self.sequence = sequence
        self.frozen = frozenset(frozen)
        self.whole = WholeBatch()
        for view in self.views.values():
            view.whole = self.whole
        for parameter in self.encoders.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Recommender:
        """Set the mode; an encoder layer follows it only if its weight matrices train, a method's modules always."""
        super().train(mode)
        for view in self.views.values():
            view.set_mode(mode)
        return self

    def hidden_states(self, items: Items) -> dict[Modality, Any]:
        """The hidden states that the item encoder reads, by modality: given with the items, or computed."""
        return {modality: self.states(modality, items) for modality in self.item_encoder.reads}

    def states(self, modality: Modality, items: Items) -> States:
        """What the item encoder reads of one encoder: given with the items, or computed."""
        if items.states is not None and modality in items.states:
            dtype = next(self.item_encoder.parameters()).dtype
            return map_tensors(items.states[modality], lambda t: _cast(t, dtype) if t.is_floating_point() else t)
        with torch.no_grad() if modality in self.frozen else nullcontext():
            return self.views[modality].encode(
                self.item_encoder.reads[modality], tokens=items.tokens, token_mask=items.token_mask, image=items.image
            )

    def encode_items(self, items: Items) -> Tensor:
        """Item vectors (n, d) of a set of items."""
        vectors: Tensor = self.item_encoder(self.hidden_states(items), items.ids)
        return vectors

    def user_vectors(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """User vectors (B, L, d), one per position, from item vectors (B, L, d) under ``mask`` (B, L)."""
        users: Tensor = self.sequence(vectors, mask)
        return users

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by their learning rate: recommender, text, image, method, and what ``group`` named."""
        parts = [("recommender", self.sequence), (self.item_encoder.group, self.item_encoder), *self.encoders.items()]
        groups: dict[str, list[nn.Parameter]] = {}
        for default, part in parts:
            named = _named_groups(part)
            for parameter in part.parameters():
                if parameter.requires_grad:
                    groups.setdefault(named.get(parameter, default), []).append(parameter)
        return groups


def _cast(states: Tensor, dtype: torch.dtype) -> Tensor:
    """``states`` (n, levels, ...) in ``dtype``; those of every token level by level in memory, as an encoder's are."""
    if states.ndim < 4:
        return states.to(dtype)
    return states.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format).transpose(0, 1)


def _named_groups(root: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters of ``root`` that ``group`` named."""
    return {
        getattr(part, own): name
        for part in root.modules()
        for own, name in vars(part).get(_GROUPS, {}).items()
        if own in part._parameters and getattr(part, own) is not None
    }
