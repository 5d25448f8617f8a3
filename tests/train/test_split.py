"""The parts of a training step, measured after training: what they are, and that they change nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.meta import MetaCell
from tpme.bench.run.counters import exact_counters
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.facts import method_counters, parameter_counts
from tpme.bench.train.loop import Trainer
from tpme.bench.train.split import FEWEST, PARTS, SHARE, WARMUP, guarded_split, step_split
from tpme.methods.base import Context, Method, Schedule, StepState
from tpme.methods.registry import BUILTIN, create

MakeTrainer = Callable[..., Trainer]
SLEEP_S = 0.02


class Slow(Method):
    """Sleeps in one part of a step, once ``part`` names it; and counts its steps."""

    part = ""
    steps = 0  # of the class: what an object counts is put back

    def _sleep(self, part: str) -> None:
        time.sleep(SLEEP_S if part == self.part else 0)

    def before_step(self, state: StepState) -> None:
        Slow.steps += 1
        self._sleep("forward_s")

    def after_backward(self, state: StepState) -> None:
        self._sleep("update_s")


@pytest.fixture
def trained(make_trainer: MakeTrainer) -> Trainer:
    trainer = make_trainer(Slow(Method.Config()), epochs=1, max_steps_per_epoch=3)
    trainer.run()
    return trainer


@pytest.mark.alone
@pytest.mark.parametrize("part", PARTS)
def test_time_is_charged_to_the_part_that_spends_it(
    trained: Trainer, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = trained.loader.epoch

    def slow_epoch(number: int) -> Any:
        for batch in epoch(number):
            time.sleep(SLEEP_S)
            yield batch

    def slow_backward(gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(SLEEP_S)
        return gradient

    assert isinstance(trained.method, Slow)
    trained.method.part = part
    if part == "data_wait_s":
        monkeypatch.setattr(trained.loader, "epoch", slow_epoch)
    if part == "backward_s":
        next(trained.model.sequence.parameters()).register_hook(slow_backward)
    readings = {name: reading.value for name, reading in step_split(trained).items()}
    assert set(readings) == set(PARTS)
    for name, seconds in readings.items():
        assert seconds is not None
        assert (seconds >= SLEEP_S) == (name == part), readings


class Restless(Method):
    """Changes, in every step, everything that it can reach; its optimiser moves weights at learning rate 0."""

    steps = 0

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        model.views["text"].layers[0].requires_grad_(True)
        model.register_buffer("seen", torch.zeros(2))
        self.average, self.history, self.count = torch.zeros(3), [torch.zeros(2)], 0
        self.teacher = torch.nn.Linear(2, 2)

    def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        if not hasattr(self, "kept"):
            self.kept = torch.optim.SGD(groups, momentum=0.9)
        return self.kept

    def before_step(self, state: StepState) -> None:
        Restless.steps += 1
        self.last = state.step
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(3)

    def after_step(self, state: StepState, context: Context) -> None:
        model: Any = state.model
        with torch.no_grad():
            for parameter in (*model.parameters(), *self.teacher.parameters()):
                parameter.add_(0.01)  # as an optimiser does that decays weights by itself
        model.seen += 1
        self.average += 1
        self.history[0] += 1
        self.history.append(torch.ones(1))
        self.count += 1
        model.views["text"].layers[1].requires_grad_(True)
        model.sequence.blocks[0].query.weight.data = torch.zeros(16, 16)
        model.sequence.blocks[1].ffn_in = torch.nn.Identity()
        model.sequence.blocks[1].ffn_out = torch.nn.Identity()
        model.mark = "changed"


OPTIONS = {"autopeft": {"configuration": {"text": {"serial": 2}, "image": {"prefix": 2}}}}
"""Its default is a search, which needs a package that may be missing."""


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that steps after training may not change, comparable."""
    model = trainer.model
    return {
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "objects": [(name, id(part), part.training) for name, part in model.named_modules()]
        + [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "mark": getattr(model, "mark", None),
        "method": {name: repr(value) for name, value in vars(trainer.method).items()},
        "teacher": [p.tolist() for p in getattr(trainer.method, "teacher", torch.nn.Identity()).parameters()],
        "training": (trainer.state.step, trainer.state.epoch, trainer.state.stage, list(trainer.outcome.step_s)),
        "scaler": trainer.scaler.state_dict(),
        "generators": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    }


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in ("dapt", "dyt", "fft", "iisan", "id") else pytest.mark.slow)
        for name in sorted(BUILTIN)
    ],
)
def test_what_follows_training_leaves_everything_as_it_was(make_trainer: MakeTrainer, method: str) -> None:
    trainer = make_trainer(create(method, OPTIONS.get(method, {})), precision="bf16", modalities=("text", "image"))
    trainer.run()
    before = state_of(trainer)
    step_split(trainer)
    parameter_counts(trainer.model, trainer.method)
    method_counters(trainer.method, trainer.model, method)
    exact_counters(MetaCell.trained(trainer, DataShape.of(trainer.dataset)))
    assert state_of(trainer) == before


def test_not_even_a_method_that_changes_everything_leaves_a_trace(make_trainer: MakeTrainer) -> None:
    method = Restless(Method.Config())
    trainer = make_trainer(method, epochs=1, max_steps_per_epoch=3)
    trainer.run()
    momentum = {id(p): state["momentum_buffer"].clone() for p, state in method.kept.state.items()}
    rates = [group["lr"] for group in method.kept.param_groups]
    before, Restless.steps = state_of(trainer), 0
    assert step_split(trainer)["update_s"].value is not None
    assert Restless.steps >= WARMUP + FEWEST, "it did train on"
    assert state_of(trainer) == before
    assert method.last == trainer.state.step - 1, "its schedule is not left"
    assert [group["lr"] for group in method.kept.param_groups] == rates
    for parameter, state in method.kept.state.items():
        assert torch.equal(state["momentum_buffer"], momentum[id(parameter)])


def test_a_step_that_fails_leaves_no_trace_either(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(Restless(Method.Config()), epochs=1, max_steps_per_epoch=3)
    trainer.run()
    before = state_of(trainer)
    monkeypatch.setattr(Restless, "after_backward", lambda *_: 1 / 0)
    readings = guarded_split(trainer)
    assert "ZeroDivisionError" in str(readings["forward_s"].reason)
    assert state_of(trainer) == before


@pytest.mark.parametrize(("trained_steps", "measured"), [(3, 0), (100, 0), (200, 4), (2000, 10)])
def test_it_never_takes_much_of_a_cells_time(trained: Trainer, trained_steps: int, measured: int) -> None:
    assert isinstance(trained.method, Slow)
    trained.outcome.step_s[:] = [0.5] * trained_steps
    Slow.steps = 0
    readings = step_split(trained)["forward_s"]
    assert trained.method.steps == (measured + WARMUP if measured else 0)
    assert trained.method.steps <= SHARE * trained_steps
    if measured:
        assert f"of {measured} steps" in readings.source
    else:
        assert readings.value is None
        assert f"only {trained_steps} steps" in str(readings.reason)


def test_what_trains_nothing_says_so(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("popularity")
    trainer.run()
    readings = step_split(trainer)
    assert [readings[name].value for name in PARTS] == [None] * 4
    assert all("no training step" in str(readings[name].reason) for name in PARTS)


def test_every_row_that_trains_has_the_parts_of_its_step(card_run: Any) -> None:
    """Whatever its loop, with hooks or on cached states; and one that trains nothing says why it has none."""
    for label, result in card_run[2].items():
        assert result.status == "ok", (label, result.failure)
        parts = [result.counters[name] for name in PARTS]
        if label == "popularity":
            assert all("no training step" in str(part.reason) for part in parts)
            continue
        values = [part.value for part in parts]
        assert all(value is not None and value > 0 for value in values), label
        phase = next(phase for phase in result.phases if phase.name == "parts of a step")
        assert phase.kind == "count"
        assert result.phases.index(phase) > max(i for i, one in enumerate(result.phases) if one.kind == "rank")
