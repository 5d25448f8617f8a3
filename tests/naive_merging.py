"""PYRA's merging of one item, written out token by token: what the batched code is compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tpme.methods.parts.merging import Reactivation


def naive_merge(
    hidden: Tensor,
    metric: Tensor,
    sizes: Tensor,
    pairs: int,
    protected: int,
    gate: Reactivation | None,
    *,
    text: bool = False,
) -> tuple[Tensor, Tensor]:
    """One item without padding: hidden (T, D), metric (T, d), sizes (T,). The tokens of a ``text`` keep their order."""
    even, odd = range(0, len(hidden), 2), range(1, len(hidden), 2)
    proposals = []
    for a in even:
        if a < protected:
            continue
        similar = [float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in odd]
        proposals.append((max(similar), a, odd[int(np.argmax(similar))]))
    chosen = sorted(proposals, reverse=True)[:pairs]
    weighted = hidden * sizes[:, None]
    sources = torch.stack([weighted[a] for _, a, _ in chosen])
    if gate is not None:
        targets = torch.stack([weighted[b] for *_, b in chosen])
        mean = (sources + targets).mean(1, keepdim=True)
        variance = (sources + targets).var(1, unbiased=False, keepdim=True)
        m = (sources + targets - mean) / (variance + 1e-5).sqrt() * gate.norm.weight + gate.norm.bias
        per_channel = torch.zeros(hidden.shape[1])
        for i in range(len(chosen)):
            per_channel = per_channel + gate.pairs[0, i] * m[i]
        per_pair = torch.stack([(row * gate.channels).sum() for row in m])
        d, r = 2 / (1 + (-per_channel).exp()), 2 / (1 + (-per_pair).exp()) - 1
        sources = sources + sources * d[None] * r[:, None]
    total, new_sizes = [*weighted], [*sizes]
    for (_, a, b), source in zip(chosen, sources, strict=True):
        total[b], new_sizes[b] = total[b] + source, new_sizes[b] + sizes[a]
    order = [a for a in even if a not in {a for _, a, _ in chosen}] + list(odd)
    order = sorted(order) if text else order
    return torch.stack([total[i] / new_sizes[i] for i in order]), torch.stack([new_sizes[i] for i in order])
