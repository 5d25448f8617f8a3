"""Evaluation: encode every item once, then rank the held-out targets of several splits with the same vectors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Split
from tpme.bench.task.items import Items
from tpme.bench.task.ranking import rank_targets
from tpme.bench.task.recommender import Recommender

ITEMS_PER_CHUNK = 256
"""Items per pass through the encoders; 16 times as many where items are vectors or ids already."""
USERS_PER_CHUNK = 1024


@torch.no_grad()
def item_matrix(
    encode: Callable[[Items], Tensor],
    store: ItemStore,
    device: torch.device,
    tick: Callable[[float], None] = lambda _share: None,
) -> Tensor:
    """Vectors of all items, (N+1, d); row 0, padding, is zero.

    Args:
        encode: maps n items to vectors (n, d); its model must be in eval mode. store: the inputs of the items.
        device: where ``encode`` works. tick: gets the share done so far.
    """
    ids = np.arange(1, store.dataset.manifest.items + 1, dtype=np.int64)
    chunk = ITEMS_PER_CHUNK * (1 if store.every_token else 16)
    vectors = []
    for start in range(0, len(ids), chunk):
        vectors.append(encode(store.gather(ids[start : start + chunk]).to(device)))
        tick(min(1.0, (start + chunk) / len(ids)))
    matrix = torch.cat(vectors).float()
    return torch.cat([torch.zeros_like(matrix[:1]), matrix])


@torch.no_grad()
def rank_split(model: Recommender, vectors: Tensor, split: Split) -> NDArray[np.int32]:
    """Ranks (users,) of a split's targets, from item vectors (N+1, d); see ``ranking`` for the rules."""
    model.eval()
    device = vectors.device
    inputs = torch.from_numpy(split.inputs.astype(np.int64))
    users = []
    for start in range(0, len(inputs), USERS_PER_CHUNK):
        slots = inputs[start : start + USERS_PER_CHUNK].to(device)
        # Left-padded: the last position has seen the whole sequence. clone() frees the other positions.
        users.append(model.user_vectors(vectors[slots], slots > 0)[:, -1].clone())
    target, history = (torch.from_numpy(array.astype(np.int64)).to(device) for array in (split.target, split.history))
    ranks: NDArray[np.int32] = rank_targets(torch.cat(users), vectors, target, history).cpu().numpy()
    return ranks


def recall_and_ndcg(ranks: NDArray[np.int32], k: int) -> tuple[float, float]:
    """Recall@k and NDCG@k with one target per user: means of ``[rank <= k]`` and of that over ``log2(1 + rank)``.

    For choosing the epoch and for progress; reports compute their own from the recorded ranks.
    """
    hit = ranks <= k
    return float(hit.mean()), float((hit / np.log2(1.0 + ranks)).mean())
