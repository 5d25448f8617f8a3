"""Clients of a simulated federation: disjoint sets of training users, alike or different in what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.task.items import Items, map_tensors
from tpme.methods.base import Context

Ids = NDArray[np.int64]
CHUNK = 256
"""Items that are encoded at once."""
SIZES = 5.0
"""Concentration of the clients' sizes: n_k ~ Dirichlet(5)."""
FEWEST = 2
"""Users of a client: the loss of one user alone is 0, because other users' items are its negatives."""


def iid_clients(users: int, clients: int, rng: np.random.Generator) -> Ids:
    """The client of every user, (users,): a random partition into parts of equal size, as far as that is possible."""
    return rng.permutation(np.arange(users) % clients)


def dirichlet_clients(cluster: Ids, clients: int, alpha: float, rng: np.random.Generator) -> Ids:
    """The client of every user, (users,), where clients prefer different clusters.

    Client k has a prior over the clusters, q_k ~ Dirichlet(alpha), and a size n_k ~ Dirichlet(5), at least
    ``FEWEST``. Places are filled in random order, each with a user of a cluster drawn from q_k; where all those are
    taken, with any.

    Args:
        cluster: (users,) of every user. clients: at most users / ``FEWEST``.
    """
    names, index = np.unique(cluster, return_inverse=True)
    prior = rng.dirichlet(np.full(len(names), alpha), clients)
    left = [rng.permutation(np.flatnonzero(index == c)).tolist() for c in range(len(names))]
    result = np.empty(len(cluster), dtype=np.int64)
    sizes = FEWEST + rng.multinomial(len(cluster) - FEWEST * clients, rng.dirichlet(np.full(clients, SIZES)))
    for client in rng.permutation(np.repeat(np.arange(clients), sizes)):
        open_ = np.array([len(users) > 0 for users in left])
        weights = prior[client] * open_
        weights = weights if weights.sum() > 0 else open_.astype(np.float64)
        result[left[rng.choice(len(names), p=weights / weights.sum())].pop()] = client
    return result


def user_clusters(context: Context, encode: Callable[[Items], Tensor], clusters: int, rng: np.random.Generator) -> Ids:
    """The cluster with most of a user's training items, (users,); k-means over the states of all trained items.

    Args:
        encode: states (n, D) of n items. clusters: how many, fewer where there are fewer items.
    """
    items_of: list[list[int]] = []
    seen: dict[int, int] = {}
    states = []
    for items in _chunks(context, items_of, seen):
        states.append(encode(items).double().cpu().numpy())
    found = kmeans(np.concatenate(states), clusters, rng)
    return np.array([np.bincount(found[[seen[i] for i in items]]).argmax() for items in items_of])


def kmeans(points: NDArray[np.float64], clusters: int, rng: np.random.Generator, iterations: int = 25) -> Ids:
    """The cluster of every point (n, D), by direction: Lloyd's algorithm from k-means++ centres."""
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centres = points[rng.integers(len(points))][None]
    while len(centres) < min(clusters, len(points)):
        gap = _distances(points, centres).min(axis=1)
        if gap.sum() <= 0:  # no further distinct points
            break
        centres = np.concatenate([centres, points[rng.choice(len(points), p=gap / gap.sum())][None]])
    for _ in range(iterations):
        nearest = _distances(points, centres).argmin(axis=1)
        kept = np.unique(nearest)
        centres = np.stack([points[nearest == c].mean(axis=0) for c in kept])
    found: Ids = _distances(points, centres).argmin(axis=1)
    return found


def _distances(points: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances (n, k), at least 0."""
    squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1) - 2 * points @ centres.T
    clipped: NDArray[np.float64] = np.maximum(squares, 0.0)
    return clipped


def _chunks(context: Context, items_of: list[list[int]], seen: dict[int, int]) -> Iterator[Items]:
    """Yield every trained item once, in chunks; fills the items of every user, and the place of every item.

    The context names users, and gives their items in batches alone: one a user.
    """
    waiting: list[Items] = []
    for user in context.users:
        items = next(iter(context.batches([int(user)]))).items
        ids = items.ids.tolist()
        items_of.append(sorted(set(ids) - {0}))
        rows = [ids.index(item) for item in items_of[-1] if item not in seen]
        seen |= {ids[row]: len(seen) + n for n, row in enumerate(rows)}
        if rows:
            waiting.append(map_tensors(items, lambda tensor, rows=rows: tensor[rows]))  # type: ignore[misc]
        if sum(map(len, waiting)) >= CHUNK:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Items]) -> Items:
    """The items of all parts, without hidden states that came with them."""
    text, image = parts[0].tokens is not None, parts[0].image is not None
    return Items(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.tokens for part in parts if part.tokens is not None]) if text else None,
        torch.cat([part.token_mask for part in parts if part.token_mask is not None]) if text else None,
        torch.cat([part.image for part in parts if part.image is not None]) if image else None,
    )
