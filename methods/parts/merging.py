"""Token merging between the halves of an encoder's layers: the most similar tokens become one, their weighted mean.

Bipartite soft matching and proportional attention of ToMe (Bolya et al., ICLR 2023), written from their description,
with the re-activation of PYRA (Xiong et al., ECCV 2024). A token's size is the number of tokens that it stands for.
Padding has size 0: it is masked in attention by ``log 0``, never matched, and dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.task.view import EncoderView
from tpme.methods.parts.attention import Attended, extend_attention
from tpme.methods.parts.token_mask import TokenMask

# --- schedules ------------------------------------------------------------------------------------------------------

_VIT_TOKENS = 197
RELEASED: dict[str, tuple[tuple[int, ...], ...]] = {
    "low": ((16,) * 11 + (10,), (8,) * 23 + (6,)),
    "high": (
        (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3),
        (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1),
    ),
}
"""Tokens that PYRA removes in each layer of a ViT-B and of a ViT-L, which have 197."""


def scaled_targets(name: str, tokens: int, depth: int, *, protected: int = 1, floor: int = 1) -> list[int]:
    """Tokens to keep after each layer: a released schedule, scaled to other numbers of tokens and layers.

    ``p + round((N - p) (N_vit - 1) / 196)``, at least ``floor``; N_vit is the number of tokens that the ViT of the
    nearest depth keeps at the same relative depth, linearly interpolated between its layers.

    Args:
        name: ``low`` or ``high``. tokens: N. depth: number of layers. protected: p, 1 if token 0 never merges.
    """
    removed = min(RELEASED[name], key=lambda schedule: abs(len(schedule) - depth))
    kept = _VIT_TOKENS - np.concatenate([[0], np.cumsum(removed)])
    at = np.interp(np.arange(1, depth + 1) * len(removed) / depth, np.arange(len(kept)), kept)
    return [max(floor, protected + round((tokens - protected) * (k - 1) / (_VIT_TOKENS - 1))) for k in at.tolist()]


def removable(tokens: int, target: int, protected: int) -> int:
    """How many of ``tokens`` a layer removes to approach ``target``: every other one at most, none ``protected``."""
    return max(0, min(tokens - target, (tokens - protected) // 2))


def explicit_targets(removed: Sequence[int], tokens: int, protected: int) -> list[int]:
    """Tokens to keep after each layer where layer l removes ``removed[l]``, or as many as it can."""
    targets: list[int] = []
    for number in removed:
        before = targets[-1] if targets else tokens
        targets.append(before - removable(before, before - number, protected))
    return targets


def token_counts(targets: Sequence[int], tokens: int, protected: int) -> list[int]:
    """The number of tokens before the first layer and after each."""
    counts = [tokens]
    for target in targets:
        counts.append(counts[-1] - removable(counts[-1], target, protected))
    return counts


# --- matching -------------------------------------------------------------------------------------------------------


class Matching(NamedTuple):
    """The tokens that stay and the r pairs that merge, the most similar pair first.

    kept: (n, T - r), their positions. source: (n, r), positions of the tokens that merge. target: (n, r), the places,
    among the kept, of the tokens that they merge into. stays: (n, T - r) bool, false for a kept place that holds no
    token, as of padding; merges: (n, r) bool, false for a pair that does not merge; ``None``: all true.
    """

    kept: Tensor
    source: Tensor
    target: Tensor
    stays: Tensor | None = None
    merges: Tensor | None = None


@torch.no_grad()
def match(metric: Tensor, pairs: int, *, protected: int, real: Tensor | None = None, keep: int = 1) -> Matching:
    """Bipartite soft matching: each token of A (even positions) proposes the most similar one of B (odd positions).

    The ``pairs`` most similar proposals merge; several may have one target. The kept tokens are the rest of A, in
    order, and then B. With ``real``, only an item's real tokens merge, every other one at most, until ``keep`` are
    left. They keep their order, so an item with nothing to merge stays as it is; its padding follows them and is
    dropped where it does not fit into T - r.

    Args:
        metric: (n, T, d), compared by their cosine. pairs: r, at most (T - protected) // 2. protected: 1 keeps token 0.
        real: (n, T) bool, true for the item's tokens, which come before its padding; ``None``: all. keep: see above.
    """
    n, tokens, _ = metric.shape
    best, partner = _proposals(metric, protected, real)
    # Stable, as equal tokens are common (a white background): the same on every device and in every batch.
    source = best.argsort(dim=1, descending=True, stable=True)[:, :pairs]
    partner = partner.gather(1, source)
    position = torch.arange(tokens, device=metric.device)
    gone = torch.zeros(n, tokens, dtype=torch.bool, device=metric.device)
    if real is None:
        order = torch.cat([position[::2], position[1::2]])
        gone.scatter_(1, source, True)
        places = gone.byte().argsort(dim=1, stable=True)[:, : tokens - pairs]
        target = ((~gone).cumsum(1) - 1).gather(1, partner + (tokens + 1) // 2)
        return Matching(order[places], 2 * source, target)
    count = real.sum(1, keepdim=True)
    merges = position[:pairs] < torch.minimum((count - keep).clamp(min=0), (count - protected) // 2)
    gone = gone.scatter_(1, 2 * source, merges) | ~real
    kept = gone.byte().argsort(dim=1, stable=True)[:, : tokens - pairs]
    target = ((~gone).cumsum(1) - 1).gather(1, 2 * partner + 1)
    return Matching(kept, 2 * source, target, ~gone.gather(1, kept), merges)


def _proposals(metric: Tensor, protected: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each token of A: the similarity of its partner (n, A), -inf where it has none, and its place in B (n, A)."""
    # In full precision: rounded scores have ties.
    with torch.autocast("cuda" if metric.is_meta else metric.device.type, enabled=False):
        metric = functional.normalize(metric.float(), dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if real is not None:
        scores = scores.masked_fill(~(real[:, ::2, None] & real[:, None, 1::2]), -torch.inf)
    if protected:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    return best, partner


# --- merging --------------------------------------------------------------------------------------------------------


class Reactivation(nn.Module):
    """``s' = s + s dD dr``: a source is re-scaled by one weight a channel and one a pair before it merges.

    ``M = LayerNorm(s + t)``, ``dD = 2 sigmoid(W_r M)`` (n, 1, D) mixes the pairs, ``dr = 2 sigmoid(M W_D) - 1``
    (n, r, 1) mixes the channels. W_r (1, r) starts uniformly within 1, W_D (D,) at 0, so s' = s at the start.

    Args:
        width: D. pairs: the most pairs that merge in this layer. W_r[i] belongs to the i-th most similar pair.
    """

    def __init__(self, width: int, pairs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pairs = nn.Parameter(torch.empty(1, pairs).uniform_(-1, 1))
        self.channels = nn.Parameter(torch.zeros(width))

    def forward(self, source: Tensor, target: Tensor, merges: Tensor | None = None) -> Tensor:
        """Map sources (n, r, D) to the same shape.

        Args:
            source, target: features times sizes. merges: (n, r) bool, the pairs that merge; ``None``: all.
        """
        mixed = self.norm(source + target)
        if merges is not None:
            mixed = mixed * merges[..., None]
        per_channel = 2 * (self.pairs[:, : source.shape[1]] @ mixed).sigmoid()
        per_pair = 2 * (mixed @ self.channels).sigmoid() - 1
        scaled: Tensor = source * (1 + per_channel * per_pair[..., None])
        return scaled


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Positions (n, k) among the tokens of each item, as rows (n k,) of states (n T, D)."""
    first: Tensor = tokens * torch.arange(len(index), device=index.device)[:, None]
    return (index + first).flatten()


def merge(
    hidden: Tensor, sizes: Tensor, matching: Matching, reactivation: Reactivation | None = None
) -> tuple[Tensor, Tensor]:
    """Merge tokens into the means of what they stand for, re-activated sources ``s'`` in place of s.

    ``x_t <- (size_t x_t + sum of size_s s') / (size_t + sum of size_s)``; only targets change.

    Args:
        hidden: (n, T, D). sizes: (n, T). matching: of these tokens. reactivation: ``None``: the plain mean.

    Returns:
        (n, T - r, D) and its sizes (n, T - r). Their sum stays that of ``sizes``.
    """
    source_sizes, kept_sizes = sizes.gather(1, matching.source), sizes.gather(1, matching.kept)
    if matching.merges is not None and matching.stays is not None:
        source_sizes, kept_sizes = source_sizes * matching.merges, kept_sizes * matching.stays
    new_sizes = kept_sizes.scatter_add(1, matching.target, source_sizes)
    weights = source_sizes[..., None].to(hidden.dtype)
    # Whole rows, which ``gather`` would copy by element.
    rows, width = hidden.flatten(0, 1), hidden.shape[2]
    into = _flat(matching.target, matching.kept.shape[1])
    kept = rows.index_select(0, _flat(matching.kept, hidden.shape[1]))
    target = kept.index_select(0, into).view(*matching.target.shape, width)
    source = weights * rows.index_select(0, _flat(matching.source, hidden.shape[1])).view_as(target)
    activated = source
    if reactivation is not None:
        target_sizes = kept_sizes.gather(1, matching.target)[..., None].to(hidden.dtype)
        activated = reactivation(source, target_sizes * target, matching.merges)
    share = new_sizes.gather(1, matching.target).clamp(min=1)[..., None].to(hidden.dtype)
    change = ((activated - weights * target) / share).to(kept.dtype)
    kept.index_add_(0, into, change.flatten(0, 1))
    return kept.view(*matching.kept.shape, width), new_sizes


# --- in an encoder --------------------------------------------------------------------------------------------------


class TokenMerging(nn.Module):
    """Merges tokens between the halves of one layer, and weights the keys of its attention by their sizes.

    Each layer has a state of its own, so that activation checkpointing can run it again.

    Args:
        layer: its index. keep: tokens to keep. pairs: the most pairs that merge. protected: 1 keeps token 0.
        sizes: of the running forward pass, before the first layer and after each; shared by all layers.
            ``None`` is 1 for every token that is not padding.
        mask: the token mask of a text; ``None`` for images. reactivation: ``None``: plain means.
    """

    def __init__(
        self,
        layer: int,
        keep: int,
        pairs: int,
        protected: int,
        sizes: list[Tensor | None],
        mask: TokenMask | None,
        reactivation: Reactivation | None,
    ) -> None:
        super().__init__()
        self.layer, self.keep, self.pairs, self.protected = layer, keep, pairs, protected
        self.sizes, self.mask, self.reactivation = sizes, mask, reactivation
        self.metric: Tensor | None = None
        self.tokens: int | None = None
        """Tokens after the layer, in the last forward pass."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Attended:
        """Add ``log size`` to the scores of every key, and keep the mean key over the heads as the metric."""
        self.metric = key.detach().mean(1)
        sizes = self.sizes[self.layer]
        return query, key, value, mask if sizes is None else sizes.log().to(query.dtype)[:, None, None]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (n, T, D) to (n, T - r, D)."""
        sizes, metric, self.metric = self.sizes[self.layer], self.metric, None
        assert metric is not None
        pairs = min(removable(hidden.shape[1], self.keep, self.protected), self.pairs)
        if pairs:
            if sizes is None:
                real = self.mask.value if self.mask is not None else None
                sizes = hidden.new_ones(hidden.shape[:2], dtype=torch.float32) if real is None else real.float()
            real = sizes > 0 if self.mask is not None else None
            matching = match(metric, pairs, protected=self.protected, real=real, keep=self.keep)
            hidden, sizes = merge(hidden, sizes, matching, self.reactivation)
        self.sizes[self.layer + 1], self.tokens = sizes, hidden.shape[1]
        return hidden


def install_merging(view: EncoderView, targets: Sequence[int], tokens: int, protected: int) -> nn.ModuleList:
    """Merge tokens in every layer of an encoder; all but the last layer re-activate the sources.

    A pooled mean is then weighted by size. What the last layer merges never reaches token 0.

    Args:
        targets: tokens to keep after each layer. tokens: the most tokens of an item, for the number of pairs.
        protected: 1 keeps token 0.
    """
    depth, width = view.shape.depth, view.shape.width
    sizes: list[Tensor | None] = [None] * (depth + 1)
    mask = TokenMask.of(view) if view.modality == "text" else None
    layers = nn.ModuleList()
    for i, (before, after) in enumerate(pairwise(token_counts(targets, tokens, protected))):
        trains = i < depth - 1 and before > after
        reactivation = Reactivation(width, before - after) if trains else None
        layer = TokenMerging(i, targets[i], before - after, protected, sizes, mask, reactivation)
        extend_attention(view, i, layer.attend)
        view.insert_between(i, layer)
        layers.append(layer)
    view.module.register_forward_pre_hook(partial(_forget, sizes))
    view.reads_mask = partial(_weights, sizes)
    return layers


def _forget(sizes: list[Tensor | None], _module: nn.Module, _args: object) -> None:
    sizes[:] = [None] * len(sizes)


def _weights(sizes: list[Tensor | None], mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The weights (n, T') of a state's tokens in a mean: their sizes. Layers with as many tokens have the same."""
    for size in sizes:
        if size is not None and size.shape[1] == hidden.shape[1]:
            return size
    return hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
