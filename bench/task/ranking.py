"""Full-catalogue ranking of one held-out target a user.

Rank = 1 + the number of *other* candidates that score at least as high as the target: a tie counts against the model,
so a constant scorer ranks every target last and cannot score. Candidates are all items; the user's earlier items are
taken out. A target that stands among those can never be found: it is reported as ``in_history``. A score that is not
finite is an error, never a hit.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORE_BYTES = 128 * 2**20
"""Bound on the score block of one chunk of users (float32, users x items); a single user's row may exceed it."""
CACHE_BYTES, LEAST_USERS = 8 * 2**20, 64
"""On a CPU a chunk keeps to the cache, which halves the time of its passes; but a product of fewer users is slow."""


class NonFiniteScoreError(ArithmeticError):
    """A user's score is NaN or infinite."""


@torch.no_grad()
def rank_targets(
    users: Tensor, items: Tensor, target: Tensor, history: Tensor, score_bytes: int = SCORE_BYTES
) -> Tensor:
    """Rank each user's target in the whole catalogue.

    Args:
        users: (U, d) user vectors. items: (N+1, d) item vectors, N < 2^24; row 0 is padding and no candidate.
        target: (U,) int64 item ids. history: (U, H) int64 item ids to take out, 0-padded; repeats are allowed.
        score_bytes: bound on the memory of one chunk's scores.

    Returns:
        (U,) int32 ranks from 1. A target in its user's history gets rank N: it loses to everything.

    Raises:
        NonFiniteScoreError: naming the first user, where a score is NaN or infinite.
    """
    candidates = items[1:].float()
    chunk = users_per_chunk(candidates.shape[0], score_bytes)
    if not items.is_cuda:
        chunk = min(chunk, max(LEAST_USERS, users_per_chunk(candidates.shape[0], CACHE_BYTES)))
    ranks = [
        _rank_chunk(users[i : i + chunk].float(), candidates, target[i : i + chunk], history[i : i + chunk], first=i)
        for i in range(0, len(users), chunk)
    ]
    return torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.int32, device=users.device)


def users_per_chunk(items: int, score_bytes: int = SCORE_BYTES) -> int:
    """How many users' float32 scores over ``items`` candidates fit into ``score_bytes``; at least 1."""
    return max(1, score_bytes // (4 * items))


def _rank_chunk(users: Tensor, candidates: Tensor, target: Tensor, history: Tensor, first: int) -> Tensor:
    scores = _scores(users, candidates)
    _check_finite(scores, first)
    wanted = scores.gather(1, target[:, None] - 1)
    # Earlier items that score at least as high will be counted: take each out once, however often it repeats.
    earlier = history.sort(dim=1).values
    again = torch.zeros_like(earlier, dtype=torch.bool)
    again[:, 1:] = earlier[:, 1:] == earlier[:, :-1]
    taken_out = (scores.gather(1, (earlier - 1).clamp(min=0)) >= wanted) & (earlier > 0) & ~again
    # In place, and summed as float32 (exact below 2^24): a sum of booleans would first copy them to eight bytes each.
    at_least = scores.ge_(wanted).sum(dim=1).long()  # the target itself is one of them, hence no "1 +"
    rank = at_least - taken_out.sum(dim=1)
    in_history = (history == target[:, None]).any(dim=1)
    return torch.where(in_history, candidates.shape[0], rank).to(torch.int32)


def _scores(users: Tensor, candidates: Tensor) -> Tensor:
    """Scores (u, N). Equal items must score equal to the last bit, or rounding would break ties in a target's favour.

    A matrix product sums every column in the same order. The matrix-vector product that BLAS takes for a single user
    does not, so that user is computed twice.
    """
    if len(users) == 1:
        return (users.repeat(2, 1) @ candidates.T)[:1]
    return users @ candidates.T


def _check_finite(scores: Tensor, first: int) -> None:
    suspect = ~scores.sum(dim=1).isfinite()  # a finite sum has finite terms only; no (u, N) mask is built
    if bool(suspect.any()):
        bad = suspect.nonzero()[:, 0]
        bad = bad[~scores[bad].isfinite().all(dim=1)]  # finite scores whose sum overflowed are no error
        if len(bad):
            raise NonFiniteScoreError(
                f"the scores of user {first + int(bad[0])} (from 0) are not finite; the model diverged"
            )
