"""Exact counters of a cell: the same numbers on every machine, without running anything.

One training step of the canonical batch runs on the ``meta`` device, under the cell's precision (CUDA's autocast) and
with torch's math attention, because a fused kernel hides FLOPs and the tensors it saves depend on the device. A record
counts the structure that training has left, ``tpme plan`` the one that the last stage starts with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpme.bench.counting.meta import MetaCell
from tpme.bench.counting.modes import Target, Tracker, rounded
from tpme.bench.record import Modality, Reading
from tpme.bench.task.items import map_tensors
from tpme.bench.train.step import AUTOCAST, total_loss


@dataclass(frozen=True)
class Step:
    """The cost of one training step of the canonical batch.

    forward_flops, backward_flops: of matrix products and convolutions, 1 multiply-add = 2 FLOPs; what activation
    checkpointing computes again counts as backward. saved_bytes: what autograd keeps between forward and backward
    pass, distinct storages, weights and batch excluded, half-precision copies of weights included. gradient_bytes: of
    the trained parameters. peak_bytes: most memory alive at one time, with everything the cell holds. uncounted:
    operators that may compute something but have no FLOP formula. work: operators by (dtype, FLOPs, bytes moved).
    """

    forward_flops: int
    backward_flops: int
    saved_bytes: int
    gradient_bytes: int
    peak_bytes: int
    uncounted: tuple[str, ...]
    work: Counter[tuple[torch.dtype, int, int]]


@dataclass(frozen=True)
class Counts:
    """Memory that a cell holds all the time (bytes), and one step with torch's math attention.

    cache_bytes: of the feature cache of each encoder. given_bytes: of precomputed states.
    """

    batch: str
    trainable: int
    stored_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    cache_bytes: dict[Modality, int]
    given_bytes: int
    step: Step

    def readings(self) -> dict[str, Reading]:
        """The counters as a record keeps them."""
        step, on = self.step, f"one step on meta, math attention; {self.batch}"
        lacking = f"no FLOP formula for {', '.join(step.uncounted)}" if step.uncounted else None
        flops = {"forward_flops": step.forward_flops, "backward_flops": step.backward_flops}
        sizes = {
            "saved_bytes": (step.saved_bytes, f"kept by autograd for the backward pass of {on}"),
            "gradient_bytes": (step.gradient_bytes, f"gradients of {on}"),
            "weight_bytes": (self.weight_bytes, "all parameters and buffers of the model"),
            "optimizer_bytes": (self.optimizer_bytes, "state of the optimiser for all trainable parameters"),
            "trainable_parameters": (self.trainable, "counted from the model on meta"),
            "stored_bytes": (self.stored_bytes, "what must be kept beside the untouched encoders"),
        }
        return {
            name: Reading(value=value, source=f"1 multiply-add = 2 FLOPs, {on}", valid=not lacking, reason=lacking)
            for name, value in flops.items()
        } | {name: Reading(value=value, source=source) for name, (value, source) in sizes.items()}


def count(of: MetaCell) -> Counts:
    """The exact counters of a cell."""
    model = of.model
    step = run_step(of, fused_attention=False)
    state = list(_optimizer_state(of))
    model.zero_grad(set_to_none=True)
    trained = [parameter for group in model.parameter_groups().values() for parameter in group]
    return Counts(
        batch=of.describe(),
        trainable=sum(parameter.numel() for parameter in trained),
        stored_bytes=sum(map(_size, of.method.state(model).values())),
        weight_bytes=sum(map(_size, _weights(of))),
        optimizer_bytes=sum(map(_size, state)),
        cache_bytes=of.cache_bytes,
        given_bytes=of.given_bytes,
        step=step,
    )


def run_step(
    of: MetaCell, *, fused_attention: bool, sharded: Collection[nn.Parameter] = (), buffered: bool = False
) -> Step:
    """Forward and backward pass of the canonical batch, gradients kept.

    Args:
        of: the cell. fused_attention: attention by the kernel that CUDA would choose, in place of torch's math.
        sharded: parameters whose memory is left out, because it is spread over several devices. buffered: leave out
            the memory of gradients as soon as they are there, because they are moved to buffers for other devices.
    """
    dtype = AUTOCAST.get(of.cell.training.precision)
    target = Target(dtype, fused_attention=fused_attention)
    left_out, batch = set(sharded), list[Tensor]()
    map_tensors(of.batch, lambda tensor: batch.append(tensor) or tensor)  # type: ignore[func-returns-value]
    tracker = Tracker([*(weight for weight in _weights(of) if weight not in left_out), *batch], left_out)
    trained = [weight for weight in of.model.parameters() if weight.requires_grad and buffered]
    hooks = [weight.register_post_accumulate_grad_hook(_drop_gradient) for weight in trained]  # type: ignore[no-untyped-call]
    with sdpa_kernel(SDPBackend.MATH), tracker:
        with target, tracker.saving():
            of.method.before_step(of.state)
            loss = total_loss(of.method, of.model, of.batch)
        target.end_forward()
        forward, saved = tracker.flops, tracker.saved_bytes()
        if loss.requires_grad:
            with target:
                _backward(loss)
    for hook in hooks:
        hook.remove()
    gradients = [parameter.grad for parameter in of.model.parameters() if parameter.grad is not None]
    return Step(
        forward_flops=forward,
        backward_flops=tracker.flops - forward,
        saved_bytes=saved,
        gradient_bytes=sum(map(_size, gradients)),
        peak_bytes=tracker.peak_bytes,
        uncounted=tuple(sorted(tracker.uncounted)),
        work=tracker.work,
    )


def planned_peak(counts: Counts, step: Step, memory_bytes: int | None, workspace_bytes: int) -> int:
    """Peak memory of training on its device: a step, the optimiser's state, and the stored states if they fit.

    Args:
        counts: of the cell. step: with the attention of the device. memory_bytes: of the device; ``None`` where
            everything fits. workspace_bytes: memory that its matrix library takes from torch's allocator.
    """
    held = step.peak_bytes + rounded(counts.optimizer_bytes) + workspace_bytes
    states = sum(counts.cache_bytes.values()) + counts.given_bytes
    if memory_bytes is None or states <= (memory_bytes - counts.weight_bytes) // 2:  # the rule of placement.place
        held += rounded(states)
    return held


def _backward(loss: Tensor) -> None:
    """``loss.backward()``, but within the active mode: checkpointing repeats the forward pass in it."""
    Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _optimizer_state(of: MetaCell) -> Iterator[Tensor]:
    """The optimiser's tensors after its first step, without its step counts."""
    groups = of.method.param_groups(of.model, of.cell.lr)
    if not groups:
        return
    optimizer = of.method.optimizer(groups, fused=False)
    optimizer.step()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim)


def _weights(of: MetaCell) -> list[Tensor]:
    return [*of.model.parameters(), *of.model.buffers()]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
