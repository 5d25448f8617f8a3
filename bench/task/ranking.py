"""Full-catalogue ranking of one held-out target per user.

Rank = 1 + the number of *other* candidates that score at least as high as the target: a tie counts against the model,
so a constant scorer ranks every target last. Candidates are all items except the user's earlier ones. A target that is
among those can never be a hit: it is reported as ``in_history``. A score that is not finite is an error, never a hit.

The order of float32 sums, and so their last bits, belongs to the BLAS kernel of the machine. Ranks do not depend on it:
where the scores of an item and of the target lie within the rounding bound of a float32 product, the sign of
``u . (v_item - v_target)`` in float64 decides, summed in a fixed order. Every rank equals the one of float64 scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SCORE_BYTES = 128 * 2**20
"""Bound on the score block of one chunk of users (float32, users x items); a single user's row may exceed it."""
CACHE_BYTES, LEAST_USERS = 8 * 2**20, 64
"""On a CPU a chunk keeps to the cache, which halves the time of its passes; but a product of fewer users is slow."""
BLOCK = 256
"""Scores that are searched together for near ones; most blocks hold none."""
HITS = 2**10
"""Blocks with near scores that are searched element by element at one time."""
PAIRS = 2**11
"""Pairs of a user and an item that are compared in float64 at one time."""
ROUNDOFF = 2.0**-24
"""Unit roundoff of float32."""


class NonFiniteScoreError(ArithmeticError):
    """A user's score is NaN or infinite."""


@torch.no_grad()
def rank_targets(
    users: Tensor, items: Tensor, target: Tensor, history: Tensor, score_bytes: int = SCORE_BYTES
) -> Tensor:
    """Rank each user's target in the whole catalogue.

    Beside the scores of one chunk it holds one copy of the item vectors.

    Args:
        users: (U, d) user vectors. items: (N+1, d) item vectors, N < 2^24; row 0 is padding and no candidate.
        target: (U,) int64 item ids. history: (U, H) int64 item ids to take out, 0-padded; repeats are allowed.
        score_bytes: bound on the memory of one chunk's scores.

    Returns:
        (U,) int32 ranks from 1. A target in its user's history gets rank N: it loses to everything.

    Raises:
        NonFiniteScoreError: naming the first user whose scores are NaN or infinite.
    """
    users, candidates = users.float(), items[1:].float()
    count, own = len(candidates), target[:, None] - 1
    scaled, centred = _scaled(users, candidates)
    near, equal = _NearPairs(users, candidates, own[:, 0]), _equal_items(candidates)
    removed = torch.cat([own, torch.where(history > 0, history - 1, own)], dim=1)
    chunk = users_per_chunk(count, score_bytes)
    if not items.is_cuda:
        chunk = min(chunk, max(LEAST_USERS, users_per_chunk(count, CACHE_BYTES)))
    buffer = scaled.new_empty(_whole_blocks(min(chunk, len(users)) * count))  # one for all chunks
    above_less_below = torch.zeros_like(target)
    with torch.autocast(items.device.type, enabled=False), _ieee_products():
        for start in range(0, len(users), chunk):
            part = slice(start, start + chunk)
            scores = _scores(scaled[part], centred, buffer)
            wanted = scores.gather(1, own[part])
            if equal is not None:
                scores.masked_fill_(equal == equal[own[part]], torch.inf)
            scores.scatter_(1, removed[part], -torch.inf)
            # In place, for memory: 1 where an item is above the target, -1 where below, 0 where near.
            order = scores.sub_(wanted).clamp_(-1, 1).round_()
            above_less_below[part] = order.sum(dim=1).long()
            blocks = buffer[: _whole_blocks(order.numel())]
            blocks[order.numel() :] = 1
            near.search(blocks.view(-1, BLOCK), start * count)
    pairs, not_below = near.counts()
    rank = 1 + (above_less_below + count - pairs) // 2 + not_below
    return torch.where((history == target[:, None]).any(dim=1), count, rank).to(torch.int32)


def users_per_chunk(items: int, score_bytes: int = SCORE_BYTES) -> int:
    """How many users' float32 scores over ``items`` candidates fit into ``score_bytes``; at least 1."""
    return max(1, score_bytes // (4 * items))


def _scaled(users: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """User vectors (U, d) and item vectors (N, d) whose float32 scores are in true order where they differ by over 1/2.

    Items are centred, which moves all scores of a user by the same amount and makes rounding small where vectors are
    alike. A float32 product of length d, in any order of its sum, is off by at most n r / (1 - n r) |u| |v|, with
    n = d and r = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Here n = d + 6: scaling,
    centring and subtracting round, too.
    """
    blocks = _parts(candidates, 4096)
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(candidates)
    centred = torch.empty_like(candidates)
    for block, part in zip(blocks, _parts(centred, 4096), strict=True):
        part.copy_(block.double() - mean)
    longest = torch.stack([block.double().norm(dim=1).max() for block in _parts(centred, 4096)]).max()
    exact = users.double()
    lengths = exact.norm(dim=1, keepdim=True)
    bad = (~(lengths * longest).isfinite()).nonzero()
    if len(bad):
        raise NonFiniteScoreError(f"the scores of user {int(bad[0, 0])} (from 0) are not finite; the model diverged")
    n = users.shape[1] + 6
    bound = 4 * n * ROUNDOFF / (1 - n * ROUNDOFF)
    # The floors are for vectors of zeros, whose scores are all near.
    return (exact / lengths.clamp(min=1e-300) / (bound * longest.clamp(min=1e-30))).float(), centred


def _equal_items(candidates: Tensor) -> Tensor | None:
    """Numbers (N,) that are equal where item vectors are, for a model that gives most items the same; else None.

    Equal items tie. Where they are few the comparison of near pairs finds them; where they are most of the catalogue,
    as with a collapsed model, it would take minutes.
    """
    if 2 * len(torch.unique(candidates[:, 0])) > len(candidates):
        return None
    numbers: Tensor = torch.unique(candidates, dim=0, return_inverse=True)[1]
    return numbers


class _NearPairs:
    """Pairs of a user and an item whose float32 scores do not decide which is higher; float64 does.

    Args:
        users: (U, d). candidates: (N, d). target: (U,) index of each user's target among the candidates.
    """

    def __init__(self, users: Tensor, candidates: Tensor, target: Tensor) -> None:
        self.users, self.candidates, self.target = users, candidates, target
        self.pairs, self.not_below = torch.zeros_like(target), torch.zeros_like(target)
        self.queued: list[tuple[Tensor, Tensor]] = []

    def search(self, blocks: Tensor, first: int) -> None:
        """Find the zeros among -1, 0 and 1 (b, BLOCK), whose first element is number ``first`` of the scores (U, N).

        Norms of blocks find the few that hold a zero. To look at every element would take half as long as the product.
        """
        for hit in _parts((torch.linalg.vector_norm(blocks, dim=1) ** 2 < BLOCK - 0.5).nonzero()[:, 0], HITS):
            self.queued.append((first + hit * BLOCK, blocks[hit]))
            if sum(len(numbers) for numbers, _ in self.queued) >= HITS:
                self._compare()

    def counts(self) -> tuple[Tensor, Tensor]:
        """Per user the number of pairs, and of those whose item is not below the target: (U,) int64 each."""
        self._compare()
        return self.pairs, self.not_below

    def _compare(self) -> None:
        if not self.queued:
            return
        numbers, blocks = (torch.cat(part) for part in zip(*self.queued, strict=True))
        self.queued = []
        hit, place = (blocks == 0).nonzero(as_tuple=True)
        score = numbers[hit] + place
        for number in _parts(score, PAIRS):
            user, item = number // len(self.candidates), number % len(self.candidates)
            ahead = _not_below(self.users[user], self.candidates[item], self.candidates[self.target[user]])
            self.pairs += user.bincount(minlength=len(self.pairs))
            self.not_below += user[ahead].bincount(minlength=len(self.pairs))


def _scores(users: Tensor, candidates: Tensor, buffer: Tensor) -> Tensor:
    """The product (u, N) of (u, d) and (N, d), at the beginning of ``buffer``."""
    size = len(users), len(candidates)
    return torch.mm(users, candidates.T, out=buffer[: size[0] * size[1]].view(size))


def _not_below(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Whether ``u . (v_item - v_target) >= 0`` in float64: (P,) booleans for P triples of vectors, each (P, d).

    Halves are added until one term is left: a fixed order of rounded operations, equal on every machine.
    """
    terms = users.double() * (items.double() - targets.double())
    while (half := terms.shape[1] // 2) > 0:
        terms = torch.cat([terms[:, :half] + terms[:, half : 2 * half], terms[:, 2 * half :]], dim=1)
    return terms[:, 0] >= 0


def _whole_blocks(size: int) -> int:
    """``size`` rounded up to a multiple of BLOCK."""
    return -(-size // BLOCK) * BLOCK


def _parts(tensor: Tensor, size: int) -> list[Tensor]:
    return [tensor[start : start + size] for start in range(0, len(tensor), size)]


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Float32 products in float32, whatever was allowed before: the bound does not hold for TF32 or bfloat16."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
