"""The procedure of a cell: its stages, and the context that a method's own procedure uses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tpme.bench.measure.clock import now
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Cell, Epoch, PhaseKind
from tpme.bench.task.batches import Batch, ItemStore, TrainBatches
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.build import check_passes, separate_generators, steps_per_epoch
from tpme.bench.train.epochs import EpochLoop, overrides
from tpme.bench.train.kept import Kept, Part
from tpme.bench.train.outcome import Outcome
from tpme.bench.train.ranks import Ranks
from tpme.bench.train.step import forward
from tpme.methods.base import Context, Method, Result, Stage, Users, Validation


class Trainer(EpochLoop):
    """Trains one cell; the ``Context`` of a method's own training procedure.

    Args:
        cell, model, method, dataset, store, phases, device, progress, ranks: see ``EpochLoop``.
        kept: the finished parts of the procedure. build: makes the trainer of a fresh model, for ``fork``.
        seed: by default the cell's.
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
        *,
        kept: Kept,
        build: Callable[[Method, int], Trainer],
        seed: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(
            cell, model, method, dataset, store, phases, device, progress, cell.seed if seed is None else seed, ranks
        )
        self.kept, self.build = kept, build
        self._extra_batches = self._endless_batches()

    # --- the procedure --------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train by the method's procedure; a method without trainable parameters is only evaluated."""
        self._count_trainable()
        if not self.model.parameter_groups():
            self.validate()
            return self.outcome
        if overrides(self.method, "before_training"):
            with self.phases.phase("estimate"):
                self.method.before_training(self)
        self.method.run(self)
        if self.outcome.test_ranks is None:  # its procedure trained nothing
            self.validate()
        return self.outcome

    def train(self, epochs: int | None = None, users: Users | None = None, kind: PhaseKind = "train") -> None:
        """Train by the method's stages, each with a new optimiser. Stops early on validation within a stage."""
        epochs = self.cell.training.epochs if epochs is None else epochs
        if epochs < 1:
            raise ValueError(f"train(epochs={epochs}): epochs must be at least 1")
        stages = self.method.stages()
        if len({stage.name for stage in stages}) < len(stages):
            raise ValueError("stages() needs a different name for every stage: T, M and P are those of the last one")
        with self._only(users, epochs):
            for stage, share in zip(stages, _split_epochs(epochs, stages), strict=True):
                self.state.stage = stage
                self.method.begin_stage(self.state)
                if self.cell.training.compile and overrides(self.method, "begin_stage"):
                    torch.compiler.reset()  # compiled code does not see hooks that a stage adds
                if self.cell.training.activation_checkpointing and self.model.views.keys() - self.model.frozen:
                    check_passes(self.cell.method, self.method)
                self._count_trainable()
                self._train_stage(stage.name, share, kind)

    def _train_stage(self, name: str, epochs: int, kind: PhaseKind) -> None:
        if kind == "train":
            self.outcome.begin_stage(name, len(self.phases.phases))
        optimizer = self.optimizer()
        stale = 0
        for _ in range(epochs):
            self.state.epoch += 1
            if kind != "train":
                self.train_epoch(optimizer, f"{name} epoch {self.state.epoch}".strip(), kind)
                continue
            stale = 0 if self._recorded_epoch(optimizer, name) else stale + 1
            if stale >= self.cell.training.patience:
                break

    def _recorded_epoch(self, optimizer: torch.optim.Optimizer, stage: str) -> bool:
        """Train and validate an epoch that counts; returns whether validation improved."""
        outcome, index = self.outcome, len(self.outcome.epochs) + 1
        trained = self.train_epoch(optimizer, f"{stage} epoch {index}".strip())
        train_s = self.phases.phases[-1].wall_s
        vectors, found = self._validated(f"epoch {index}")
        outcome.epochs.append(
            Epoch(
                index=index,
                stage=stage,
                train_s=train_s,
                steps=trained.steps,
                loss=trained.loss,
                losses=trained.losses,
                valid_recall_10=found.recall_10,
                valid_ndcg_10=found.ndcg_10,
            )
        )
        return self._ranked_if_best(vectors, found, f"epoch {index}")

    @contextmanager
    def _only(self, users: Users | None, epochs: int) -> Iterator[None]:
        """Train on these users within the block, with their batches, steps per epoch and schedule."""
        before = self.loader, self._extra_batches
        self.loader = self._batches_of(users)
        if users is not None:
            self._extra_batches = self._endless_batches()
        state, schedule = self.state, self.state.schedule
        state.schedule = replace(schedule, epochs=epochs, steps_per_epoch=len(self.loader))
        try:
            yield
        finally:
            self.loader, self._extra_batches = before
            state.schedule = schedule

    def _batches_of(self, users: Users | None) -> TrainBatches:
        if users is None:
            return self.loader
        rows = np.unique(np.fromiter(users, np.int64))
        if len(rows) != len(users) or not len(rows) or rows[0] < 0 or rows[-1] >= len(self.users):
            raise ValueError(f"users must be row numbers of training users, 0 to {len(self.users) - 1}, each once")
        return self.loader.of(rows, steps_per_epoch(len(rows), self.cell.training))

    def batches(self, users: Users | None = None) -> Iterator[Batch]:
        """Yield the training batches of ``users``, by default all, once, in an order of their own.

        Here as in ``training_losses``, every rank computes whole batches.
        """
        return self._batches_of(users).whole().epoch(0)

    def training_losses(self, steps: int) -> Iterator[Tensor]:
        """The task's loss, with its graph, on the next ``steps`` training batches, in a separate order."""
        for batch in itertools.islice(self._extra_batches, steps):
            self.model.train()
            with self.autocast():
                loss = forward(self.method, self.model, batch).loss
            yield loss

    def _endless_batches(self) -> Iterator[Batch]:
        while True:
            yield from self.loader.whole().epoch(0)

    def validate(self) -> Validation:
        """The model's quality now; the test targets are ranked where it is the best so far."""
        vectors, found = self._validated("")
        self._ranked_if_best(vectors, found, "")
        return found

    # --- parts of a procedure -------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """A folder of the cell that survives the process."""
        self.kept.folder.mkdir(parents=True, exist_ok=True)
        return self.kept.folder

    def fork(self, method: Method, seed: int) -> Trainer:
        """The trainer of a fresh model of the cell, adapted by ``method``, on the same data."""
        with self.phase("adapt", "fork"):
            return self.build(method, seed)

    def adopt(self, fork: Context) -> None:
        """Continue as the fork: its model, method, state, epochs and ranks become the cell's."""
        assert isinstance(fork, Trainer)
        self.seed, self.model, self.method, self.state = fork.seed, fork.model, fork.method, fork.state
        self.loader, self._extra_batches = fork.loader, fork._extra_batches
        self.outcome, self.scaler, self.terms_of, self.delta = fork.outcome, fork.scaler, fork.terms_of, fork.delta

    def once(self, kind: PhaseKind, name: str, work: Callable[[], Result]) -> Result:
        """The result of ``work``, done in this attempt or in an earlier one."""
        if kind == "train":
            raise ValueError("once() keeps no training epochs: choose kind 'search' or 'round'")
        part: Part | None = self.ranks.from_first(self.kept.read(name) if self.ranks.rank == 0 else None)
        if part is None:
            started, resumed_s, outcome = now(self.device), self.kept.resumed_s, replace(self.outcome)
            aside = self.delta, self._extra_batches, self.scaler
            self.delta, self._extra_batches, self.scaler = None, self._endless_batches(), self._new_scaler()
            with self.phase(kind, name), separate_generators(f"{self.seed} {name}", self.device):
                result = work()
            # Only what is kept may outlast the work: a later attempt finds nothing else.
            self.outcome = outcome
            self.delta, self._extra_batches, self.scaler = aside
            spent_s = now(self.device) - started + self.kept.resumed_s - resumed_s
            found = Part(result, spent_s, self.state.epoch, self.state.step)
            part = self.ranks.from_first(self.kept.write(name, found) if self.ranks.rank == 0 else None)
        assert part is not None
        self.state.epoch, self.state.step = part.epoch, part.step
        return part.result


def _split_epochs(epochs: int, stages: tuple[Stage, ...]) -> list[int]:
    """Share the epochs among the stages, at least one each; they add up to ``epochs`` where that is possible."""
    ends = np.cumsum([stage.share for stage in stages])
    bounds = [0, *(round(float(end / ends[-1]) * epochs) for end in ends)]
    return [max(1, last - first) for first, last in itertools.pairwise(bounds)]
