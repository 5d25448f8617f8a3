"""What is read off the model of a recorded training: parameters, stored bytes, FLOPs of a batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpme.bench.counting.modes import Tracker
from tpme.bench.errors import UserError
from tpme.bench.record import Parameters, Reading


def count_parameters(model: nn.Module, before: Parameters | None) -> Parameters:
    """Counts by ``requires_grad``; ``before`` are those counted earlier in the same training.

    peft counts its models itself, because a 4-bit parameter holds two weights a byte.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable, total = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    if callable(of_peft := getattr(model, "get_nb_trainable_parameters", None)):
        trainable, total = of_peft()
    return Parameters(
        trainable=trainable,
        trainable_max=max(trainable, before.trainable_max if before else 0),
        total=total,
        by_group={},
        stored_bytes=sum(p.numel() * p.element_size() for p in trained),
    )


def bytes_on_disk(path: Path) -> int:
    """Size of a file, or of all files below a folder. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; save the trained parameters before run.stored()")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@torch.no_grad()
def first_not_finite(model: nn.Module) -> str | None:
    """Name of the first trainable parameter with a value that is not finite; None where all are finite."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return next((name for name, parameter in trained.items() if not bool(parameter.isfinite().all())), None)


def batch_flops(loss_of: Callable[[], Tensor], model: nn.Module | None) -> dict[str, Reading]:
    """FLOPs of a forward and a backward pass: matrix products and convolutions, 1 multiply-add = 2 FLOPs.

    Attention runs as torch's math and compiled parts run eagerly, because fused kernels hide their FLOPs. Gradients,
    buffers and random generators are afterwards as before.

    Args:
        loss_of: computes the loss of a batch, a scalar with its graph. model: whose state is kept.
    """
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    tracker = Tracker()
    with _kept(model), torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), eager, tracker:
        loss = loss_of()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UserError(
                "run.flops() takes a function that returns the loss of a batch: a scalar tensor with its graph"
            )
        forward = tracker.flops
        loss.backward()  # type: ignore[no-untyped-call]
    source, unknown = "counted while one batch ran", ", ".join(sorted(tracker.uncounted))
    reason = f"a lower bound: no FLOP formula for {unknown}" if unknown else None
    return {
        name: Reading(value=value, source=source, valid=not unknown, reason=reason)
        for name, value in (("forward_flops", forward), ("backward_flops", tracker.flops - forward))
    }


@contextmanager
def _kept(model: nn.Module | None) -> Iterator[None]:
    """Gradients and buffers of the model are afterwards as before."""
    parameters = list(model.parameters()) if model is not None else []
    gradients = [parameter.grad for parameter in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if model is not None else []
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
