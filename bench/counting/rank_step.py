"""A rank's share of the canonical step, when N ranks train one cell together.

The rank runs on ``meta`` as a single device does, with a smaller batch: it encodes every N-th of the n items, and
scores every N-th user over all n candidates. Of the ranks it is the one with the most filled slots. Between the two
parts stands a gather: n vectors out of n / N, in the backward pass the gradients of its own. ``traffic`` has its bytes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpme.bench.counting.batch import canonical_slots
from tpme.bench.counting.exact import Counts, Step, planned_peak, run_step
from tpme.bench.counting.meta import MetaCell
from tpme.bench.counting.structure import META
from tpme.bench.counting.traffic import Sharded, Traffic, step_traffic
from tpme.bench.record import Modality
from tpme.bench.task.items import Items, map_tensors
from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Method


@dataclass(frozen=True)
class RankStep:
    """One rank's part of a cell's training.

    step: with the attention of the device, FLOPs and operators of its share. updated: parameters that its optimiser
    updates. peak_bytes: planned peak of its device. traffic: bytes that it sends in a step.
    """

    step: Step
    updated: float
    peak_bytes: int
    traffic: Traffic


def owns_procedure(method: Method) -> bool:
    """Whether the method controls the whole training itself (``run``), and so trains on one device."""
    return type(method).run is not Method.run


def count_rank(
    whole: MetaCell, counts: Counts, ranks: int, *, memory_bytes: int | None, workspace_bytes: int
) -> RankStep:
    """The share of one of ``ranks`` ranks in a cell's training step.

    Args:
        whole: the cell. counts: of its step on one device. ranks: at most the users of a batch. memory_bytes,
            workspace_bytes: of a device, as for ``planned_peak``.
    """
    encoders = [_Spread.of(whole, modality) for modality in whole.model.views] if whole.cell.training.shard else []
    spread = {parameter for encoder in encoders for parameter in encoder.parameters}
    step = run_step(_share_of(whole, ranks), fused_attention=True, sharded=spread, buffered=ranks > 1)
    whole.model.zero_grad(set_to_none=True)
    trained = [parameter for group in whole.model.parameter_groups().values() for parameter in group]
    scattered = sum(parameter.numel() for parameter in trained if parameter in spread)
    updated = sum(parameter.numel() for parameter in trained) - scattered * (1 - 1 / ranks)
    sharded = _sharded(encoders) if encoders else None
    replicated = sum(_size(parameter) for parameter in trained if parameter not in spread)
    buffers = replicated if ranks > 1 else 0  # of the gradients that are added up, kept from step to step
    held = sum(encoder.held_bytes(ranks) for encoder in encoders) + buffers
    return RankStep(
        step=step,
        updated=updated,
        peak_bytes=planned_peak(
            _held_counts(counts, ranks, updated, memory_bytes),
            replace(step, peak_bytes=step.peak_bytes + held),
            memory_bytes,
            workspace_bytes,
        ),
        traffic=step_traffic(
            ranks,
            items=len(whole.batch.items),
            width=whole.cell.training.embedding_dim,
            gradient_bytes=replicated,
            sharded=sharded,
            passes=len(whole.method.passes()),
        ),
    )


def _held_counts(counts: Counts, ranks: int, updated: float, memory_bytes: int | None) -> Counts:
    """What one rank holds besides its step: states of the parameters that it updates, and states of items.

    States that do not fit whole into half of a device are spread over the ranks, item by item.
    """
    states = sum(counts.cache_bytes.values()) + counts.given_bytes
    fits = memory_bytes is None or states <= (memory_bytes - counts.weight_bytes) // 2
    parts = 1 if fits else ranks
    return replace(
        counts,
        optimizer_bytes=round(counts.optimizer_bytes * updated / counts.trainable) if counts.trainable else 0,
        cache_bytes={modality: -(-size // parts) for modality, size in counts.cache_bytes.items()},
        given_bytes=-(-counts.given_bytes // parts),
    )


# --- its step --------------------------------------------------------------------------------------------------------


def _share_of(whole: MetaCell, ranks: int) -> MetaCell:
    """The cell as the rank with the most filled slots sees it; the model is that of ``whole``."""
    share, method = copy.copy(whole), copy.copy(whole.method)
    items = len(whole.batch.items)
    encode = method.encode

    def gathered(model: Recommender, own: Items) -> Tensor:
        vectors: Tensor = _Gather.apply(encode(model, own), items)  # type: ignore[no-untyped-call]
        return vectors

    vars(method)["encode"] = gathered
    share.method = method
    slots = canonical_slots(whole.data, whole.cell.training.users_per_batch)
    users = max((slots[rank::ranks] for rank in range(ranks)), key=np.count_nonzero)
    positions = int(np.count_nonzero(users[:, :-1]))
    batch, own = whole.batch, -(-items // ranks)
    share.batch = replace(
        batch,
        items=map_tensors(batch.items, lambda tensor: tensor[:own].clone()),
        slot=batch.slot[: len(users)].clone(),
        mask=batch.mask[: len(users)].clone(),
        candidates=replace(
            batch.candidates,
            slots=batch.candidates.slots[: len(users)].clone(),
            rows=torch.empty(positions, dtype=torch.int64, device=META),
            target=torch.empty(positions, dtype=torch.int64, device=META),
        ),
    )
    return share


class _Gather(torch.autograd.Function):
    """All item vectors (n, d) from those of one rank; gradients of its own from those of all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, items: int) -> Tensor:
        ctx.own = len(own)
        return own.new_empty(items, own.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_empty(ctx.own, gradients[0].shape[1]), None


# --- encoders that are spread over the ranks -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spread:
    """An encoder whose layers, and the rest as one more group, are gathered when they are needed (FSDP2).

    parameters: all of it. layers: bytes of each layer. rest: bytes besides the layers, which stay gathered through the
    step. gradients: bytes of all trained parameters. scattered: those of the largest group. trains: a backward pass
    runs through it.
    """

    parameters: tuple[nn.Parameter, ...]
    layers: tuple[int, ...]
    rest: int
    gradients: int
    scattered: int
    trains: bool

    @classmethod
    def of(cls, cell: MetaCell, modality: Modality) -> _Spread:
        view = cell.model.views[modality]
        groups = [tuple(layer.parameters()) for layer in view.layers]
        inside = {parameter for group in groups for parameter in group}
        rest = tuple(parameter for parameter in view.module.parameters() if parameter not in inside)
        trained = [sum(map(_size, filter(_trains, group))) for group in (*groups, rest)]
        return cls(
            parameters=(*inside, *rest),
            layers=tuple(sum(map(_size, group)) for group in groups),
            rest=sum(map(_size, rest)),
            gradients=sum(trained),
            scattered=max(trained),
            trains=modality not in cell.model.frozen,
        )

    def held_bytes(self, ranks: int) -> int:
        """Bytes on one rank, besides what its step computes: shards, the rest, two layers, gradients to be scattered.

        Two layers, because the next one is gathered while one is at work.
        """
        shards = -(-(sum(self.layers) + self.rest + self.gradients) // ranks)
        return shards + self.rest + sum(sorted(self.layers)[-2:]) + self.scattered


def _sharded(encoders: list[_Spread]) -> Sharded:
    return Sharded(
        forward_bytes=sum(sum(encoder.layers) + encoder.rest for encoder in encoders),
        backward_bytes=sum(sum(encoder.layers) for encoder in encoders if encoder.trains),
        gradient_bytes=sum(encoder.gradients for encoder in encoders),
        groups=sum(len(encoder.layers) + 1 for encoder in encoders),
    )


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
