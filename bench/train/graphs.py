"""``cuda_graphs = true``: forward and backward pass of a step without encoders, replayed as two CUDA graphs.

A step on cached states, or on item ids alone, is hundreds of kernels of a few microseconds each, and a GPU waits for
the host that starts them. A graph starts all of them at once, but works on tensors of fixed size and address, while
the number of distinct items changes with every batch. So batches are copied into tensors with room for the largest
one. The rest is masked like padding, which leaves loss and gradients unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.errors import UserError
from tpme.bench.task.batches import Batch
from tpme.bench.task.items import Items, map_tensors
from tpme.bench.task.loss import Candidates, in_batch_logits
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.loop import Trainer
from tpme.bench.train.step import loss_terms
from tpme.methods.base import Method

IGNORED = -100
"""Label of a row that is no position: cross entropy leaves it out of sum and mean."""
_INSIDE = ("encode", "stages", "begin_stage", "before_step", "passes", "begin_pass", "losses", "after_step")
"""Hooks that may change what a step does; a graph would repeat the recorded step."""


def unsupported_reason(method: Method, model: Recommender) -> str | None:
    """Why the steps of a cell cannot be recorded; ``None`` where they can."""
    if model.views:
        return "encoders run in every step, so kernel launches do not limit it"
    if not model.parameter_groups():
        return "nothing trains"
    hooks = [name for name in _INSIDE if getattr(type(method), name) is not getattr(Method, name)]
    return f"its {hooks[0]}() may change what a step does" if hooks else None


def replay_graphs(trainer: Trainer) -> str | None:
    """Let ``trainer`` record its first step and replay it from then on; returns the reason where that cannot be.

    Raises UserError on a CPU.
    """
    if trainer.device.type != "cuda":
        raise UserError("cuda_graphs = true needs a CUDA device; turn it off or run with --device cuda")
    reason = unsupported_reason(trainer.method, trainer.model)
    if reason is None:
        trainer.terms_of = GraphedLoss(trainer.method, trainer.model, trainer.cell.training.users_per_batch)
    return reason


class PaddedLoss(nn.Module):
    """The task's loss of a batch that is kept in tensors of fixed size.

    Args:
        model: without encoders. like: a batch of B users and S slots; sizes allow B S items, candidates and rows.
    """

    def __init__(self, model: Recommender, like: Batch) -> None:
        super().__init__()
        self.model, self.room = model, like.slot.numel()
        self.states = map_tensors(like.items.states, lambda tensor: tensor.new_empty(0))
        candidates = like.candidates
        self.inputs = (
            *(torch.zeros_like(t) for t in (like.slot, like.mask, candidates.slots)),
            *(self._buffer(t) for t in (like.items.ids, candidates.log_p, candidates.log_count)),
            *(self._buffer(t) for t in (candidates.item, candidates.rows, candidates.target, candidates.target)),
            *(self._buffer(tensor) for tensor in _tensors(like.items.states)),
        )

    def _buffer(self, like: Tensor) -> Tensor:
        # A mask of no token at all would make attention over them NaN.
        return like.new_full((self.room, *like.shape[1:]), like.dtype == torch.bool)

    def fill(self, batch: Batch) -> tuple[Tensor, ...]:
        """Copy ``batch`` into the inputs of ``forward`` and return them; what is left of an earlier one is masked."""
        slot, mask, slots, ids, log_p, log_count, item, rows, target, label, *tensors = self.inputs
        candidates, none = batch.candidates, batch.candidates.distinct
        for place, value in ((slot, batch.slot), (mask, batch.mask)):
            place.copy_(value)
        # "No item" is the index behind the last one: of the room, and no longer of the batch.
        slots.copy_(candidates.slots).masked_fill_(slots == none, self.room)
        item.fill_(self.room)[: len(candidates.item)].copy_(candidates.item)
        item.masked_fill_(item == none, self.room)
        label.fill_(IGNORED)
        for place, value in (
            (ids, batch.items.ids),
            (log_p, candidates.log_p),
            (log_count, candidates.log_count),
            (rows, candidates.rows),
            (target, candidates.target),
            (label, candidates.target),
            *zip(tensors, _tensors(batch.items.states), strict=True),
        ):
            place[: len(value)].copy_(value)
        return self.inputs

    def forward(
        self,
        slot: Tensor,
        mask: Tensor,
        slots: Tensor,
        ids: Tensor,
        log_p: Tensor,
        log_count: Tensor,
        item: Tensor,
        rows: Tensor,
        target: Tensor,
        label: Tensor,
        *states: Tensor,
    ) -> Tensor:
        """The loss, a scalar; the fields of ``Batch`` and ``Candidates``, and ``target`` with ``IGNORED`` in it."""
        tensors = iter(states)
        items = Items(ids, states=map_tensors(self.states, lambda _: next(tensors)))
        candidates = Candidates(log_p, log_count, item, slots, rows, target, distinct=self.room)
        vectors = self.model.encode_items(items)
        users = self.model.user_vectors(vectors[slot[:, :-1]], mask)
        return functional.cross_entropy(in_batch_logits(users, vectors, candidates), label, ignore_index=IGNORED)


def _tensors(states: object) -> list[Tensor]:
    """The tensors in ``states``, in the order of ``map_tensors``."""
    found: list[Tensor] = []
    map_tensors(states, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


class GraphedLoss:
    """The loss of a batch and, when it is differentiated, its gradients: two graphs, recorded at the first batch.

    A smaller last batch runs without graphs. Random numbers are drawn as without graphs.
    """

    def __init__(self, method: Method, model: Recommender, users: int) -> None:
        self.method, self.model, self.users = method, model, users
        self._padded: PaddedLoss | None = None
        self._run: Callable[..., Tensor]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, a scalar with its graph, under the name of the only pass."""
        if len(batch.slot) != self.users:
            return loss_terms(self.method, self.model, batch)
        if self._padded is None:
            self._padded = PaddedLoss(self.model, batch)
            self._run = _recorded(self._padded, self._padded.fill(batch))
        loss = self._run(*self._padded.fill(batch))
        return {"task": loss.clone()}  # the next replay writes to the same place


def _recorded(padded: PaddedLoss, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    device = inputs[0].device
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    random = torch.cuda.get_rng_state(device)  # recording runs the step a few times
    # Without the cache of cast weights: a graph must cast the weights as they are when it is replayed.
    with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
        run = torch.cuda.make_graphed_callables(padded, inputs, allow_unused_input=True)
    torch.cuda.set_rng_state(random, device)
    return cast("Callable[..., Tensor]", run)
