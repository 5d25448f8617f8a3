"""The steps of a recorded training, and the epochs, or stretches of so many steps or samples, that they make up."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.record import Epoch, Reading
from tpme.bench.train.outcome import Outcome
from tpme.bench.train.timing import StepTimer

FOLD = 50
"""So many losses are kept as one tensor: on a GPU each tensor takes at least 512 bytes."""


@dataclass(frozen=True)
class TimeOf:
    """What T is the time of: an epoch, or so many steps or samples."""

    text: str
    number: int = 1
    unit: str = "epoch"

    @classmethod
    def parse(cls, text: str) -> TimeOf:
        """Read ``"epoch"``, ``"250 steps"`` or ``"1000 samples"``; raises UserError for anything else."""
        if text == "epoch":
            return cls(text)
        if found := re.fullmatch(r"([1-9][0-9]{0,8}) (steps|samples)", text):
            return cls(text, int(found[1]), found[2])
        raise UserError(f"time_of is 'epoch', '250 steps' or '1000 samples' (any number of them), not {text!r}")


class TrainedStep(NamedTuple):
    """One optimiser step."""

    seconds: float
    epoch: int
    """As the training loop numbers it; 0 where it does not."""
    samples: int
    loss: float | None


class NotFinite(NamedTuple):
    """The first step whose loss is not finite."""

    epoch: int
    step: int


@dataclass
class Steps:
    """The steps of all training phases. ``begin`` and ``end`` enclose those of one phase."""

    device: torch.device
    time_of: TimeOf
    done: list[TrainedStep] = field(default_factory=list)
    """Of the phases that have ended."""
    train_s: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """Epoch -> seconds of its training phases."""
    partial: dict[int, str] = field(default_factory=dict)
    """Epochs that are not whole, and why."""
    losses: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Epoch -> losses that the loop reports by itself, of equally many steps each."""
    metrics: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    """Number of steps before it -> what was evaluated then."""
    not_finite: NotFinite | None = None
    _epoch: int = 0
    _timer: StepTimer | None = None
    _samples: list[int] = field(default_factory=list)
    _pending: list[Tensor | float | None] = field(default_factory=list)
    _folded: list[Tensor] = field(default_factory=list)
    _has_loss: list[bool] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many steps there were so far."""
        return len(self.done) + len(self._samples)

    @property
    def in_flight(self) -> int:
        """Number, from 1 and within its epoch, of the step that runs now."""
        return sum(step.epoch == self._epoch for step in self.done) + len(self._samples) + 1

    def begin(self, epoch: int) -> None:
        """Begin the steps of a phase; call it within the phase."""
        self._epoch, self._timer = epoch, StepTimer(self.device)
        self._timer.start()

    def step(self, loss: Tensor | float | None, samples: int) -> None:
        """End a step. The host does not wait for the device: ``loss`` is read when the phase has ended."""
        assert self._timer is not None
        self._timer.lap()
        self._samples.append(samples)
        self._has_loss.append(loss is not None)
        if loss is not None:
            self._pending.append(loss.detach().reshape(()) if isinstance(loss, Tensor) else float(loss))
        if len(self._pending) == FOLD:
            self._fold()

    def end(self, wall_s: float, *, failed: bool = False) -> None:
        """Take over the steps of a phase that has ended after ``wall_s``; its epoch is not whole where it failed."""
        assert self._timer is not None
        self._fold()
        losses = iter(torch.cat(self._folded).float().cpu().tolist() if self._folded else [])
        of_steps = [next(losses) if has else None for has in self._has_loss]
        for place, loss in enumerate(of_steps):
            if loss is not None and not math.isfinite(loss) and self.not_finite is None:
                self.not_finite = NotFinite(self._epoch, self.in_flight - len(of_steps) + place)
        if failed:
            self.partial[self._epoch] = "its training failed"
        seconds = self._timer.seconds()
        self.done += map(TrainedStep, seconds, [self._epoch] * len(seconds), self._samples, of_steps)
        self.train_s[self._epoch] += wall_s
        self._timer = None
        for used in (self._samples, self._folded, self._has_loss):
            used.clear()

    def _fold(self) -> None:
        if self._pending:
            device = next((loss.device for loss in self._pending if isinstance(loss, Tensor)), "cpu")
            self._folded.append(torch.stack([torch.as_tensor(loss, device=device) for loss in self._pending]).float())
            self._pending = []

    # --- what they make up ------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        """Epochs, or stretches, that are whole, and their steps."""
        groups = self._epochs() if self.time_of.unit == "epoch" else self._stretches()
        outcome, first = Outcome(), 0
        for index, (steps, train_s, losses) in enumerate(groups, start=1):
            outcome.epochs.append(
                Epoch(
                    index=index, train_s=train_s, steps=len(steps), loss=_mean(losses),
                    metrics=self._metrics_of(first, steps),
                )
            )  # fmt: skip
            first += len(steps)
            outcome.step_s += [step.seconds for step in steps]
            outcome.step_epoch += [index] * len(steps)
        return outcome

    def _epochs(self) -> list[tuple[list[TrainedStep], float, list[float]]]:
        """Steps, seconds and losses of every epoch that is whole."""
        by_epoch: dict[int, list[TrainedStep]] = defaultdict(list)
        for step in self.done:
            by_epoch[step.epoch].append(step)
        return [
            (steps, self.train_s[epoch], _losses(steps) or self.losses.get(epoch, []))
            for epoch, steps in by_epoch.items()
            if epoch not in self.partial
        ]

    def _stretches(self) -> list[tuple[list[TrainedStep], float, list[float]]]:
        """The same of every stretch of as many steps or samples as ``time_of`` says."""
        found, current = [], list[TrainedStep]()
        for step in self.done:
            current.append(step)
            amount = len(current) if self.time_of.unit == "steps" else sum(one.samples for one in current)
            if amount >= self.time_of.number:
                found.append((current, sum(one.seconds for one in current), _losses(current)))
                current = []
        return found

    def _metrics_of(self, first: int, steps: list[TrainedStep]) -> dict[str, float]:
        """What was evaluated after a step of the stretch that begins after ``first`` steps, the latest of each name."""
        found: dict[str, float] = {}
        for place, metrics in sorted(self.metrics.items()):
            if first < place <= first + len(steps):
                found |= metrics
        return found

    def time(self, outcome: Outcome) -> Reading:
        """T in seconds: the median over epochs or stretches after the warm-up."""
        what = "epochs" if self.time_of.unit == "epoch" else f"stretches of {self.time_of.text}"
        source = f"median training time of the {what} after {outcome.warmup_epochs} warm-up"
        if not self.done:
            return Reading.missing(source, "no step was recorded: call run.step() after every optimiser step")
        if not outcome.epochs:
            why = f"none of the {what} was whole"
            if self.partial:
                why += f": {next(iter(self.partial.values()))}; time_of='250 steps' measures such a training"
            return Reading.missing(source, why)
        scale = [1.0] * len(outcome.epochs)
        if self.time_of.unit == "samples":  # a stretch ends with a whole step, so it may hold some samples more
            scale = [self.time_of.number / sum(step.samples for step in steps) for steps, *_ in self._stretches()]
        times = [epoch.train_s * factor for epoch, factor in zip(outcome.epochs, scale, strict=True)]
        return Reading(value=float(np.median(times[outcome.warmup_epochs :])), source=source)


def _losses(steps: Iterable[TrainedStep]) -> list[float]:
    return [step.loss for step in steps if step.loss is not None]


def _mean(losses: list[float]) -> float | None:
    """Mean of finite losses; None where there is none, or one that is not finite."""
    return float(np.mean(losses)) if losses and all(map(math.isfinite, losses)) else None
