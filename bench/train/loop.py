"""The training loop, with the measured region in plain sight.

One epoch is one ``train`` phase: data loading, forward, backward, optimiser step. Validation, test ranking and
bookkeeping are outside it, in separate phases. The host does not wait for the device inside an epoch, except every
``CHECK_EVERY_STEPS`` steps to check that the loss is finite, and where a method's hooks force it: by reading a value,
or with an ``after_step``, which under a gradient scaler must know whether there was a step.

The test targets are ranked with the item vectors that validation has just computed, whenever validation improved, so
the best epoch needs no checkpoint and no second encoding of the catalogue. Nothing is selected on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Cell, Epoch
from tpme.bench.task.batches import Batch, ItemStore, TrainBatches
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.evaluate import item_matrix, rank_split, recall_and_ndcg
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.build import DataSize, schedule_of
from tpme.bench.train.step import AUTOCAST, forward, total_loss
from tpme.bench.train.timing import StepTimer
from tpme.methods.base import Method, Stage, StepState

CHECK_EVERY_STEPS = 50
WARMUP_EPOCHS = 1
"""Leading epochs that do not count towards the epoch time, where there are at least three."""


class DivergedError(ArithmeticError):
    """The loss is not finite."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step} of epoch {epoch}; try a lower learning rate")
        self.epoch, self.step = epoch, step


@dataclass
class Outcome:
    """Results of training; filled epoch by epoch, so a failure keeps those of the epochs before it."""

    epochs: list[Epoch] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    step_epoch: list[int] = field(default_factory=list)
    best_epoch: int | None = None
    best_recall: float | None = None
    test_ranks: NDArray[np.int32] | None = None
    trainable_max: int = 0
    """The most parameters that trained at one time."""


def _noop() -> None:
    """No-op lap timer."""


class Trainer:
    """Trains one cell; the context of a method's own training procedure.

    Args:
        cell: the settings. model, method, dataset, store: what is trained, and on what. phases: the phase log.
        progress: called with the current activity and the share of it that is done.
    """

    def __init__(
        self,
        cell: Cell,
        model: Recommender,
        method: Method,
        dataset: Dataset,
        store: ItemStore,
        phases: PhaseLog,
        device: torch.device,
        progress: Callable[[str, float], None],
    ) -> None:
        self.cell, self.model, self.method = cell, model, method
        self.dataset, self.store, self.phases, self.device, self.progress = dataset, store, phases, device, progress
        schedule = schedule_of(cell.training, DataSize.of(dataset))
        self.batches = TrainBatches(
            dataset,
            store,
            users_per_batch=cell.training.users_per_batch,
            protocol=cell.protocol,
            seed=cell.seed,
            steps=schedule.steps_per_epoch,
            device=device,
        )
        self.state = StepState(model, schedule)
        self.step_of_epoch: int | None = None
        """The current training step, from 1; None outside the training phases."""
        self.outcome = Outcome()
        self._extra_batches = self._endless_batches()
        precision = cell.training.precision
        self.autocast_dtype = AUTOCAST.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.loss_of: Callable[[Batch], Tensor] = partial(total_loss, method, model)
        """The sum of the losses of a batch, with its graph; replaceable by a faster way to compute the same."""

    # --- the procedure --------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train by the method's procedure; a method without trainable parameters is only evaluated."""
        self._count_trainable()
        if not self.model.parameter_groups():
            self._validate(epoch=None)
            return self.outcome
        if type(self.method).before_training is not Method.before_training:
            with self.phases.phase("estimate"):
                self.method.before_training(self)
        self.method.run(self)
        if self.outcome.test_ranks is None:  # its procedure trained nothing
            self._validate(epoch=None)
        return self.outcome

    def train(self) -> None:
        """Train by the method's stages, each with a new optimiser. Stops early on validation within a stage."""
        stages = self.method.stages()
        for stage, epochs in zip(stages, _split_epochs(self.cell.training.epochs, stages), strict=True):
            self.state.stage = stage
            self.method.begin_stage(self.state)
            self._count_trainable()
            optimizer = self.optimizer()
            stale = 0
            for _ in range(epochs):
                self.state.epoch += 1
                improved = self._epoch(optimizer, stage)
                stale = 0 if improved else stale + 1
                if stale >= self.cell.training.patience:
                    break

    def optimizer(self) -> torch.optim.Optimizer:
        """The method's optimiser for the parameters that train now."""
        return self.method.optimizer(self.method.param_groups(self.model, self.cell.lr), fused=True)

    def training_losses(self, steps: int) -> Iterator[Tensor]:
        """The task's loss, with its graph, on the next ``steps`` training batches, in a separate order."""
        for batch in itertools.islice(self._extra_batches, steps):
            self.model.train()
            with self.autocast():
                loss = forward(self.model, batch).loss
            yield loss

    def _endless_batches(self) -> Iterator[Batch]:
        while True:
            yield from self.batches.epoch(0)

    def _count_trainable(self) -> None:
        now = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self.outcome.trainable_max = max(self.outcome.trainable_max, now)

    # --- one epoch ------------------------------------------------------------------------------------------------

    def _epoch(self, optimizer: torch.optim.Optimizer, stage: Stage) -> bool:
        number = self.state.epoch
        steps, loss = self.train_epoch(optimizer, f"{stage.name} epoch {number}".strip())
        return self._validate(number, train_s=self.phases.phases[-1].wall_s, steps=steps, loss=loss)

    def train_epoch(self, optimizer: torch.optim.Optimizer, name: str) -> tuple[int, float]:
        """The measured region: one ``train`` phase called ``name``; returns its steps and mean loss."""
        number = self.state.epoch
        self.model.train()
        timer, losses = StepTimer(self.device), []
        with self.phases.phase("train", name):
            timer.start()
            self.step_of_epoch = 1
            for step, batch in enumerate(self.batches.epoch(number), start=1):
                self.step_of_epoch = step
                losses.append(self.step(batch, optimizer))
                timer.lap()
                if step % CHECK_EVERY_STEPS == 0:
                    self._check(losses, number)
                self.progress(f"epoch {number}/{self.cell.training.epochs}", step / len(self.batches))
            self.step_of_epoch = None
            self.method.on_epoch_end(self.state)
            loss = self._check(losses, number)
        self._count_trainable()
        self.outcome.step_s += timer.seconds()
        self.outcome.step_epoch += [number] * len(losses)
        return len(losses), loss

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, lap: Callable[[], None] = _noop) -> Tensor:
        """Forward, backward, update; returns the loss, detached, still on the device.

        ``lap`` is called after the forward and after the backward pass.
        """
        method, state = self.method, self.state
        method.before_step(state)
        with self.autocast():
            loss = self.loss_of(batch)
        lap()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        lap()
        if _overrides(method, "after_backward"):
            self.scaler.unscale_(optimizer)
            method.after_backward(state)
        scale = self.scaler.get_scale() if _overrides(method, "after_step") else None
        self.scaler.step(optimizer)
        self.scaler.update()
        if scale is not None:
            state.skipped = self.scaler.get_scale() < scale
            if not state.skipped:
                method.after_step(state, self)
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return loss.detach()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the cell's forward passes."""
        enabled = self.autocast_dtype is not None
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled):
            yield

    def _check(self, losses: list[Tensor], epoch: int) -> float:
        """Mean loss of the epoch so far; raises DivergedError naming the first step whose loss is not finite."""
        values = torch.stack(losses).float().cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise DivergedError(epoch, int(bad[0, 0]) + 1)
        return float(values.mean())

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _validate(self, epoch: int | None, *, train_s: float = 0.0, steps: int = 0, loss: float = 0.0) -> bool:
        """Rank the validation targets and, where that improved, the test targets; returns whether it improved."""
        with self.phases.phase("validate", f"epoch {epoch}" if epoch else ""), self.autocast():
            vectors = item_matrix(self.model, self.store, self.device, lambda share: self.progress("validate", share))
            recall, ndcg = recall_and_ndcg(rank_split(self.model, vectors, self.dataset.valid), k=10)
        outcome = self.outcome
        if epoch is not None:
            outcome.epochs.append(
                Epoch(
                    index=epoch,
                    stage=self.state.stage.name,
                    train_s=train_s,
                    steps=steps,
                    loss=loss,
                    valid_recall_10=recall,
                    valid_ndcg_10=ndcg,
                )
            )
        improved = outcome.best_recall is None or recall > outcome.best_recall
        if improved:
            outcome.best_recall, outcome.best_epoch = recall, epoch
            with self.phases.phase("rank", f"epoch {epoch}" if epoch else ""), self.autocast():
                outcome.test_ranks = rank_split(self.model, vectors, self.dataset.test)
        return improved


def _overrides(method: Method, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Method, hook)


def _split_epochs(epochs: int, stages: tuple[Stage, ...]) -> list[int]:
    """Share the epochs among the stages, at least one each; they add up to ``epochs`` where that is possible."""
    ends = np.cumsum([stage.share for stage in stages])
    bounds = [0, *(round(float(end / ends[-1]) * epochs) for end in ends)]
    return [max(1, last - first) for first, last in itertools.pairwise(bounds)]
