"""No step makes the host wait for the device: it reads no value of a tensor, but for the losses that a record needs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tpme.bench.train.epochs import overrides
from tpme.bench.train.loop import Trainer
from tpme.methods.base import Method, MethodConfig
from tpme.methods.registry import BUILTIN, method_class

MakeTrainer = Callable[..., Trainer]
ROWS = [(name, cached) for name in BUILTIN for cached in (False, True)[: 1 + method_class(name).decoupled]]
# Numbers and shapes that depend on values: each of these operators ends in a read.
READING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "histc", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# On a CPU no operator runs for these.
COPYING = {"cpu", "numpy", "tolist", "__array__"}


class Reads(TorchDispatchMode):
    """Notes which operators read values: those of the step, and those of the loss record."""

    def __init__(self) -> None:
        super().__init__()
        self.of_step: list[str] = []
        self.of_record: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        picks = [i for i in args[1] if isinstance(i, Tensor)] if name in INDEXING else []
        if name in READING or any(index.dtype in (torch.bool, torch.uint8) for index in picks):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        """Note one read, and where it is."""
        frame, places = sys._getframe(2), []
        while frame is not None:
            places.append(frame.f_code.co_name)
            frame = frame.f_back
        (self.of_record if {"_check", "_term_means"} & set(places) else self.of_step).append(
            f"{name} in {', '.join(places[:12])}"
        )


class Copies(TorchFunctionMode):
    """Adds what takes a tensor to the host as a whole."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in COPYING:
            self.reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


def reads_of_an_epoch(trainer: Trainer, steps: int) -> Reads:
    optimizer = trainer.optimizer()
    with Reads() as reads, Copies(reads):
        assert trainer.train_epoch(optimizer, "epoch 1")[0] == steps
    return reads


def asks_the_scaler(trainer: Trainer, read: str = "get_scale") -> bool:
    """Whether the loop must read the scale of fp16 gradients: it tells ``after_step`` whether the step was skipped."""
    fp16 = trainer.cell.training.precision == "fp16"
    return fp16 and overrides(trainer.method, "after_step") and "get_scale" in read


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("name", "cached"), ROWS)
def test_no_step_reads_a_value(make_trainer: MakeTrainer, name: str, cached: bool, precision: str) -> None:
    trainer = make_trainer(name, cached=cached, modalities=("text", "image"), precision=precision)
    if not trainer.model.parameter_groups():
        pytest.skip("nothing trains")
    reads = reads_of_an_epoch(trainer, steps=2)
    assert [read for read in reads.of_step if not asks_the_scaler(trainer, read)] == []
    assert len(reads.of_record) > 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_step_of_an_estimation_reads_a_value(make_trainer: MakeTrainer, precision: str) -> None:
    """Of light-peft: importances are summed on the device."""
    trainer = make_trainer("light-peft", modalities=("text", "image"), precision=precision)
    with Reads() as reads, Copies(reads):
        trainer.method._estimate(trainer)
    assert reads.of_step == []


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: float(loss.detach()),
        lambda loss: bool(loss > 0),
        lambda loss: loss.detach().cpu(),
        lambda loss: loss.tolist(),
        lambda loss: loss.detach().numpy(),
        lambda loss: loss[None].nonzero(),
        lambda loss: torch.ones(1)[loss[None] > 0],
        lambda loss: torch.ones(1).masked_select(loss[None] > 0),
        lambda loss: loss.register_hook(lambda gradient: gradient * float(gradient)),  # in the backward pass
    ],
)
def test_a_method_that_reads_a_value_is_found(make_trainer: MakeTrainer, read: Callable[[Tensor], Any]) -> None:
    class Curious(Method):
        """Looks at its loss."""

        def losses(self, outputs: Any) -> dict[str, Tensor]:
            read(outputs["task"].loss)
            return super().losses(outputs)

    assert len(reads_of_an_epoch(make_trainer(Curious(MethodConfig())), steps=2).of_step) >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("name", "cached"), ROWS)
def test_the_host_never_waits_for_a_gpu(make_trainer: MakeTrainer, name: str, cached: bool, precision: str) -> None:
    """Batches included; cached states lie on the device."""
    trainer = make_trainer(name, cached=cached, modalities=("text", "image"), precision=precision, device="cuda")
    if not trainer.model.parameter_groups():
        pytest.skip("nothing trains")
    if asks_the_scaler(trainer):
        pytest.skip("the loop waits for the scale of the gradients")
    optimizer = trainer.optimizer()
    trainer.train_epoch(optimizer, "epoch 1")  # sets up optimiser, kernels and constants
    trainer.model.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in itertools.islice(trainer.loader.epoch(2), 2):
            trainer.step(batch, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
