"""One epoch of training, with the measured region in plain sight, and one evaluation.

One epoch is one ``train`` phase: data loading, forward, backward, optimiser step. Validation, test ranking and
bookkeeping are outside it, in separate phases. The host does not wait for the device inside an epoch, except every
``CHECK_EVERY_STEPS`` steps to check that the loss is finite, and where a method's hooks force it: by reading a value,
or with an ``after_step``, which under a gradient scaler must know whether there was a step.

The test targets are ranked with the item vectors that validation has just computed, whenever validation improved, so
the best epoch needs no checkpoint and no second encoding of the catalogue. Nothing is selected on them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Cell, PhaseKind
from tpme.bench.task.batches import Batch, ItemStore, TrainBatches
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.evaluate import item_matrix, rank_split, recall_and_ndcg
from tpme.bench.task.items import Items
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.averaging import GradientMean
from tpme.bench.train.build import DataSize, schedule_of
from tpme.bench.train.delta import DeltaFile
from tpme.bench.train.outcome import Outcome
from tpme.bench.train.ranks import Ranks
from tpme.bench.train.sharding import is_sharded, split_groups
from tpme.bench.train.step import AUTOCAST, loss_terms, summed
from tpme.bench.train.timing import StepTimer
from tpme.methods.base import Context, Method, StepState, Validation

CHECK_EVERY_STEPS = 50


class DivergedError(ArithmeticError):
    """The loss is not finite."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step} of epoch {epoch}; try a lower learning rate")
        self.epoch, self.step = epoch, step


class StepLoss(NamedTuple):
    """The loss of one step and its terms by name: scalars without a graph, still on the device."""

    total: Tensor
    terms: dict[str, Tensor]


class EpochLoss(NamedTuple):
    """Steps of an epoch, and the means of the loss and of its terms over them."""

    steps: int
    loss: float
    losses: dict[str, float]


def _noop() -> None:
    """No-op lap timer."""


class EpochLoop(Context):
    """Trains and evaluates one model, epoch by epoch; ``Trainer`` adds the procedure.

    Args:
        cell: the settings. model, method, dataset, store: what is trained, and on what. phases: the phase log.
        progress: called with the current activity and the share of it that is done. seed: of the order of users.
        ranks: the processes that train the cell together; each computes its share of every step.
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
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks.alone(device)
        model.whole.peers = self.ranks.peers
        self.cell, self.model, self.method, self.seed = cell, model, method, seed
        self.dataset, self.store, self.phases, self.device, self.progress = dataset, store, phases, device, progress
        self.users = np.arange(dataset.manifest.users)
        schedule = schedule_of(cell.training, DataSize.of(dataset))
        self.loader = TrainBatches(
            dataset,
            store,
            users_per_batch=cell.training.users_per_batch,
            protocol=cell.protocol,
            seed=seed,
            steps=schedule.steps_per_epoch,
            device=device,
            peers=self.ranks.peers,
        )
        self.gradients: GradientMean | None = None
        """Averages the gradients over the ranks, where there are several."""
        self.state = StepState(model, schedule)
        self.step_of_epoch: int | None = None
        """The current training step, from 1; None outside the training phases."""
        self.outcome = Outcome()
        self.autocast_dtype = AUTOCAST.get(cell.training.precision)
        self.scaler = self._new_scaler()
        self.terms_of: Callable[[Batch], dict[str, Tensor]] = partial(loss_terms, method, model)
        """The terms of the loss of a batch, with their graph; replaceable by a faster way to compute the same."""
        self.delta: DeltaFile | None = None
        """Takes what the method has trained whenever the test targets are ranked."""

    def __deepcopy__(self, _memo: object) -> EpochLoop:
        """Return itself: the copy of a method that keeps its context works on the same data."""
        return self

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.cell.training.precision == "fp16")

    def optimizer(self) -> torch.optim.Optimizer:
        """The method's optimiser for the parameters that train now; their gradients are averaged over the ranks."""
        groups = self.method.param_groups(self.model, self.cell.lr)
        if self.cell.training.shard:
            groups = split_groups(groups)
        optimizer = self.method.optimizer(groups, fused=True)
        if self.ranks.size > 1:
            if self.gradients is not None:
                self.gradients.close()
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            # FSDP averages those of sharded parameters.
            self.gradients = GradientMean([p for p in trained if not is_sharded(p)], self.ranks)
        return optimizer

    def encode(self, items: Items) -> Tensor:
        """The method's item vectors (n, d)."""
        return self.method.encode(self.model, items)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the cell's forward passes."""
        enabled = self.autocast_dtype is not None
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled):
            yield

    @contextmanager
    def phase(self, kind: PhaseKind, name: str = "") -> Iterator[None]:
        """Measure the block as one phase, or as part of the one that is open; nothing joins a ``train`` phase."""
        if "train" not in (kind, self.phases.open_kind) and self.phases.open_kind is not None:
            yield
        else:
            with self.phases.phase(kind, name):
                yield

    # --- training -------------------------------------------------------------------------------------------------

    def train_epoch(self, optimizer: torch.optim.Optimizer, name: str, kind: PhaseKind = "train") -> EpochLoss:
        """The measured region: one phase called ``name``."""
        number = self.state.epoch
        self.model.train()
        timer, steps = StepTimer(self.device), list[StepLoss]()
        with self.phase(kind, name):
            timer.start()
            self.step_of_epoch = 1
            for step, batch in enumerate(self.loader.epoch(number), start=1):
                self.step_of_epoch = step
                steps.append(self.step(batch, optimizer))
                timer.lap()
                if step % CHECK_EVERY_STEPS == 0:
                    self._check(steps, number)
                self.progress(f"epoch {number}/{self.state.schedule.epochs}", step / len(self.loader))
            self.step_of_epoch = None
            self.method.on_epoch_end(self.state)
            loss = self._check(steps, number)
        self._count_trainable()
        if kind == "train":
            self.outcome.step_s += timer.seconds()
            self.outcome.step_epoch += [len(self.outcome.epochs) + 1] * len(steps)
        return EpochLoss(len(steps), loss, _term_means(steps, self.ranks))

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, lap: Callable[[], None] = _noop) -> StepLoss:
        """Forward, backward, update.

        ``lap`` is called after the forward and after the backward pass.
        """
        method, state = self.method, self.state
        method.before_step(state)
        with self.ranks.own_draws(f"{self.seed} step {state.step}"):
            with self.autocast():
                terms = self.terms_of(batch)
                loss = summed(terms)
            lap()
            self._backward(loss)
        lap()
        if overrides(method, "after_backward"):
            self.scaler.unscale_(optimizer)
            method.after_backward(state)
        scale = self.scaler.get_scale() if overrides(method, "after_step") else None
        self.scaler.step(optimizer)
        self.scaler.update()
        if scale is not None:
            state.skipped = self.scaler.get_scale() < scale
            if not state.skipped:
                method.after_step(state, self)
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return StepLoss(loss.detach(), {name: term.detach() for name, term in terms.items()})

    def _backward(self, loss: Tensor) -> None:
        """Compute the gradients of this rank's loss, and average them over the ranks."""
        if self.gradients is not None:
            self.gradients.begin()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.gradients is not None:
            self.gradients.finish()
            self.model.whole.share = None

    def _check(self, steps: list[StepLoss], epoch: int) -> float:
        """Mean loss of the epoch so far; raises DivergedError naming the first step whose loss is not finite."""
        values = (self.ranks.sum(torch.stack([step.total for step in steps]).float()) / self.ranks.size).cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise DivergedError(epoch, int(bad[0, 0]) + 1)
        return float(values.mean())

    def _count_trainable(self) -> None:
        now = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self.outcome.trainable_max = max(self.outcome.trainable_max, now)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _validated(self, name: str) -> tuple[Tensor, Validation]:
        """Vectors of all items, (N+1, d), and the ranking of the validation targets with them."""
        self.model.eval()
        with self.phase("validate", name), self.autocast():
            tick, peers = partial(self.progress, "validate"), self.ranks.peers
            vectors = item_matrix(self.encode, self.store, self.device, tick, peers)
            return vectors, Validation(
                *recall_and_ndcg(rank_split(self.model, vectors, self.dataset.valid, peers), k=10)
            )

    def _ranked_if_best(self, vectors: Tensor, found: Validation, name: str) -> bool:
        """Rank the test targets where validation improved; returns whether it did."""
        outcome = self.outcome
        if outcome.best_recall is not None and found.recall_10 <= outcome.best_recall:
            return False
        outcome.best_recall, outcome.best_epoch = found.recall_10, len(outcome.epochs) or None
        with self.phase("rank", name), self.autocast():
            outcome.test_ranks = rank_split(self.model, vectors, self.dataset.test, self.ranks.peers)
        if self.delta is not None:
            with self.phase("export", f"adapter {name}".strip()):
                self.delta.write(self.method, self.model, self.seed)
        return True


def _term_means(steps: list[StepLoss], ranks: Ranks) -> dict[str, float]:
    """Mean of each term of the loss over the steps that have it, and over the ranks."""
    values: dict[str, list[Tensor]] = defaultdict(list)
    for step in steps:
        for name, term in step.terms.items():
            values[name].append(term)
    means = torch.stack([torch.stack(terms).float().mean() for terms in values.values()])
    return dict(zip(values, (ranks.sum(means) / ranks.size).tolist(), strict=True))


def overrides(method: Method, hook: str) -> bool:
    """Whether the method defines that hook itself."""
    return getattr(type(method), hook) is not getattr(Method, hook)
