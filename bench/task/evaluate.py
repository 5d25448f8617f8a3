"""Evaluation: encode every item once, then rank the held-out targets of several splits with the same vectors.

Several ranks deal items and users out, and each ends with the vectors and ranks of all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Split
from tpme.bench.task.dealing import Peers, dealt_rows, sharing, undealt
from tpme.bench.task.items import Items
from tpme.bench.task.ranking import NonFiniteScoreError, rank_targets
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
    peers: Peers | None = None,
) -> Tensor:
    """Vectors of all items, (N+1, d); row 0, padding, is zero.

    Args:
        encode: maps n items to vectors (n, d); its model must be in eval mode. store: the inputs of the items.
        device: where ``encode`` works. tick: gets the share done so far. peers: the ranks that each encode a share.
    """
    count = store.dataset.manifest.items
    peers = sharing(peers, count)
    ids = np.arange(1, count + 1, dtype=np.int64)[dealt_rows(peers, count)]
    chunk = ITEMS_PER_CHUNK * (1 if store.every_token else 16)
    vectors = []
    # As many passes on each rank, because sharded encoders gather their weights in every pass.
    most = len(ids) if peers is None else -(-count // peers.size)
    for start in range(0, most, chunk):
        own = ids[start : start + chunk]
        vectors.append(encode(store.gather(own if len(own) else ids[:1]).to(device))[: len(own)])
        tick(min(1.0, (start + chunk) / most))
    matrix = undealt(peers, torch.cat(vectors).float(), count)
    return torch.cat([torch.zeros_like(matrix[:1]), matrix])


@torch.no_grad()
def rank_split(model: Recommender, vectors: Tensor, split: Split, peers: Peers | None = None) -> NDArray[np.int32]:
    """Ranks (users,) of a split's targets, from item vectors (N+1, d); see ``ranking`` for the rules.

    Each of the ``peers`` ranks a share of the users. Raises NonFiniteScoreError on all of them, for one that does.
    """
    model.eval()
    peers = sharing(peers, len(split.target))
    device, own = vectors.device, dealt_rows(peers, len(split.target))
    inputs, target, history = (
        torch.from_numpy(part[own].astype(np.int64)) for part in (split.inputs, split.target, split.history)
    )
    users = []
    for start in range(0, len(inputs), USERS_PER_CHUNK):
        slots = inputs[start : start + USERS_PER_CHUNK].to(device)
        # Left-padded: the last position has seen the whole sequence. clone() frees the other positions.
        users.append(model.user_vectors(vectors[slots], slots > 0)[:, -1].clone())
    try:
        ranks = rank_targets(torch.cat(users), vectors, target.to(device), history.to(device))
    except NonFiniteScoreError:
        if peers is None:
            raise
        ranks = torch.zeros(len(target), dtype=torch.int32, device=device)  # ranks count from 1
    found: NDArray[np.int32] = undealt(peers, ranks, len(split.target)).cpu().numpy()
    if not found.all():
        raise NonFiniteScoreError(
            f"the scores of user {int(found.argmin())} (from 0) are not finite; the model diverged"
        )
    return found


def recall_and_ndcg(ranks: NDArray[np.int32], k: int) -> tuple[float, float]:
    """Recall@k and NDCG@k with one target per user: means of ``[rank <= k]`` and of that over ``log2(1 + rank)``.

    For choosing the epoch and for progress; reports compute their own from the recorded ranks.
    """
    hit = ranks <= k
    return float(hit.mean()), float((hit / np.log2(1.0 + ranks)).mean())
