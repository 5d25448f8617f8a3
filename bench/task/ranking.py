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


class NonFiniteScoreError(ArithmeticError):
    """A user's score is NaN or infinite."""


@torch.no_grad()
def rank_targets(
    users: Tensor, items: Tensor, target: Tensor, history: Tensor, score_bytes: int = SCORE_BYTES
) -> Tensor:
    """Rank each user's target in the whole catalogue.

    Args:
        users: (U, d) user vectors. items: (N+1, d) item vectors, row 0 is padding and no candidate.
        target: (U,) int64 item ids. history: (U, H) int64 item ids to take out, 0-padded; repeats are allowed.
        score_bytes: bound on the memory of one chunk's scores.

    Returns:
        (U,) int32 ranks from 1. A target in its user's history gets rank N: it loses to everything.

    Raises:
        NonFiniteScoreError: naming the first user, where a score is NaN or infinite.
    """
    candidates = items[1:].float()
    n = candidates.shape[0]
    chunk = max(1, score_bytes // (4 * n))
    ranks = [
        _rank_chunk(users[i : i + chunk].float(), candidates, target[i : i + chunk], history[i : i + chunk], first=i)
        for i in range(0, len(users), chunk)
    ]
    return torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.int32, device=users.device)


def _rank_chunk(users: Tensor, candidates: Tensor, target: Tensor, history: Tensor, first: int) -> Tensor:
    scores = users @ candidates.T  # (u, N)
    finite = scores.sum(dim=1).isfinite()  # a sum is finite only if every term is; no (u, N) mask is built
    wanted = scores.gather(1, target[:, None] - 1)
    at_least = (scores >= wanted).sum(dim=1)  # the target itself is one of them, hence no "1 +"
    # Earlier items that score at least as high were counted: take each out once, however often it repeats.
    earlier = history.sort(dim=1).values
    again = torch.zeros_like(earlier, dtype=torch.bool)
    again[:, 1:] = earlier[:, 1:] == earlier[:, :-1]
    counted = (scores.gather(1, (earlier - 1).clamp(min=0)) >= wanted) & (earlier > 0) & ~again
    rank = at_least - counted.sum(dim=1)
    rank = torch.where((history == target[:, None]).any(dim=1), candidates.shape[0], rank)
    if not bool(finite.all()):
        bad = first + int((~finite).nonzero()[0, 0])
        raise NonFiniteScoreError(f"the scores of user {bad} (from 0) are not finite; the model diverged")
    return rank.to(torch.int32)
