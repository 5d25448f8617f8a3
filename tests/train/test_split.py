"""The parts of a training step, measured after training: what they are, and that they change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tpme.bench.train.loop import Trainer
from tpme.bench.train.split import PARTS, SHARE, WARMUP, step_split
from tpme.methods.base import Method, StepState

MakeTrainer = Callable[..., Trainer]
SLEEP_S = 0.02


class Slow(Method):
    """Sleeps in one part of a step, once ``part`` names it; and counts its steps."""

    part = ""
    steps = 0

    def _sleep(self, part: str) -> None:
        time.sleep(SLEEP_S if part == self.part else 0)

    def before_step(self, state: StepState) -> None:
        self.steps += 1
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


def test_nothing_that_training_left_is_changed(trained: Trainer) -> None:
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    step, outcome = trained.state.step, list(trained.outcome.step_s)
    step_split(trained)
    assert isinstance(trained.method, Slow)
    assert trained.method.steps > len(outcome), "it did train on"
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (trained.state.step, trained.outcome.step_s) == (step, outcome)
    assert not any(module.training for module in trained.model.modules())


@pytest.mark.parametrize(("trained_steps", "measured"), [(3, 0), (100, 0), (200, 4), (2000, 10)])
def test_it_never_takes_much_of_a_cells_time(trained: Trainer, trained_steps: int, measured: int) -> None:
    assert isinstance(trained.method, Slow)
    trained.outcome.step_s[:] = [0.5] * trained_steps
    trained.method.steps = 0
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
