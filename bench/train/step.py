"""The forward side of a training step, shared by the loop, the counters and the overhead's bare loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from tpme.bench.task.batches import Batch
from tpme.bench.task.loss import in_batch_logits
from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Method, PassOutput

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the matrix products under each half precision; full precision runs without autocast."""


def forward(method: Method, model: Recommender, batch: Batch) -> PassOutput:
    """One pass over ``batch``: the task's loss over the in-batch candidates.

    Of a batch that several ranks share, the loss is N times this rank's part of it: the mean over the ranks is that of
    the whole batch.
    """
    share = model.whole.share = batch.share
    vectors = method.encode(model, batch.items)
    if share is not None:
        vectors = share.gather(vectors)
    users = model.user_vectors(vectors[batch.slot[:, :-1]], batch.mask)
    logits = in_batch_logits(users, vectors, batch.candidates)
    target = batch.candidates.target
    if share is None:
        return PassOutput(functional.cross_entropy(logits, target), logits, target)
    loss = functional.cross_entropy(logits, target, reduction="sum") / share.positions
    return PassOutput(loss, logits, target, share.positions)


def loss_terms(method: Method, model: Recommender, batch: Batch) -> dict[str, Tensor]:
    """All passes of ``method`` over ``batch``; returns the terms of its loss, scalars, by name."""
    outputs = {}
    for name in method.passes():
        method.begin_pass(name, model)
        outputs[name] = forward(method, model, batch)
    return method.losses(outputs)


def summed(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms of a loss, a scalar."""
    values = list(terms.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def total_loss(method: Method, model: Recommender, batch: Batch) -> Tensor:
    """All passes of ``method`` over ``batch``; returns the sum of its losses, a scalar."""
    return summed(loss_terms(method, model, batch))
