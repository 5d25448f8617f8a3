"""The training loss: in-batch cross entropy with popularity debiasing (IISAN; logQ correction of Yi et al., 2019).

Every slot of the batch is a candidate for every position. Candidate logits are ``u . v - log p(item)``; a candidate
whose item is in the user's own training slots is masked, except the target column itself.

Protocol ``suite`` encodes each distinct item once. All its slots share one vector and logit, so one column per distinct
item with ``+ log(count)`` gives exactly the loss and gradients of one column per slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MASKED_LOGIT = -1e4


@dataclass(frozen=True)
class Candidates:
    """The columns of the in-batch softmax, and the V valid positions of a batch that refer to them.

    log_p: (C,) log training popularity of each column's item (0 for padding).
    log_count: (C,) log of the number of slots each column represents.
    item: (C,) int64, each column's index among the batch's n distinct real items; n for padding.
    slots: (B, S) int64, the same index for every slot of every user.
    rows: (V,) int64, valid positions in the flattened (B, L) of user vectors.
    target: (V,) int64, the column of each position's next item.
    """

    log_p: Tensor
    log_count: Tensor
    item: Tensor
    slots: Tensor
    rows: Tensor
    target: Tensor
    distinct: int


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32; those in float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


def in_batch_logits(users: Tensor, vectors: Tensor, candidates: Candidates) -> Tensor:
    """Debiased, masked logits of every valid position over the batch's candidates.

    Args:
        users: (B, L, d) user vectors. vectors: (C, d) candidate item vectors.

    Returns:
        (V, C), at least float32; the target column of row v is ``candidates.target[v]``.
    """
    b, length, _ = users.shape
    rows, target = candidates.rows, candidates.target
    valid = users.flatten(0, 1).index_select(0, rows)
    scores = at_least_float32(valid @ vectors.T)
    # own[b, i]: distinct item i is in a slot of user b. The extra column is padding, never a candidate.
    own = torch.zeros(b, candidates.distinct + 1, dtype=torch.bool, device=users.device)
    own.scatter_(1, candidates.slots, True)
    own[:, -1] = True
    masked = own.index_select(1, candidates.item).index_select(0, rows // length)
    at_target = target[:, None]
    target_logit = scores.gather(1, at_target) - candidates.log_p[target][:, None]
    logits = (scores + (candidates.log_count - candidates.log_p)).masked_fill(masked, MASKED_LOGIT)
    return logits.scatter(1, at_target, target_logit)


def in_batch_loss(users: Tensor, vectors: Tensor, candidates: Candidates) -> Tensor:
    """Mean cross entropy of ``in_batch_logits`` over the valid positions, a scalar."""
    return functional.cross_entropy(in_batch_logits(users, vectors, candidates), candidates.target)
