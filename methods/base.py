"""The method contract: everything a fine-tuning method may define.

A method is one module with a configuration model and one class. Every hook has a default, so a simple method takes a
few lines: BitFit overrides ``adapt`` alone. The training settings (batch, epochs, data, precision, schedule) belong to
the task; no hook can change them for the other rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.record import Frozen, LearningRates, Modality, PhaseKind
from tpme.bench.task.batches import Batch
from tpme.bench.task.items import EncoderShape, Items
from tpme.bench.task.recommender import ItemEncoder, Recommender, TokenFusion
from tpme.bench.task.view import EncoderView


@dataclass(frozen=True)
class TaskShape:
    """Sizes that a method is given before anything is loaded.

    dim: width d of item and user vectors. items: N, ids run from 1. encoders: shape of each encoder by modality.
    title_tokens: T, the most tokens of a title.
    """

    dim: int
    items: int
    encoders: Mapping[Modality, EncoderShape]
    title_tokens: int = 30


@dataclass(frozen=True)
class Schedule:
    """The training ahead, as given to a method.

    popularity: (N+1,) share of each item among the training interactions; entry 0 is padding. title_tokens: T, the
    most tokens of a title.
    """

    epochs: int
    steps_per_epoch: int
    popularity: NDArray[np.float64]
    title_tokens: int = 30

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run, if it does not stop early."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class PassOutput:
    """The result of one forward pass over a batch.

    loss: scalar. logits: (V, C) over the in-batch candidates. target: (V,), their correct columns. On several devices
    these are the positions of this rank's users, and columns still all candidates of the whole batch.
    """

    loss: Tensor
    logits: Tensor
    target: Tensor
    positions: float | None = None

    @property
    def divisor(self) -> float:
        """Divide a sum over the rows of ``logits`` by it for the mean over the batch, instead of by their number.

        On N devices gradients and losses are averaged over the ranks, so it is V / N, V the positions of all ranks.
        """
        return len(self.target) if self.positions is None else self.positions


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own optimiser, schedule and phases; the shares of the epochs sum to 1."""

    name: str = ""
    share: float = 1.0


@dataclass
class StepState:
    """The state of the training, as passed to hooks. ``step`` counts optimiser steps from 0 over the whole run."""

    model: Recommender
    schedule: Schedule
    epoch: int = 0
    step: int = 0
    stage: Stage = field(default_factory=Stage)
    skipped: bool = False
    """The gradient scaler skipped this step because a gradient overflowed."""


@dataclass(frozen=True)
class Validation:
    """Quality on the validation targets."""

    recall_10: float
    ndcg_10: float


Users = Collection[int] | NDArray[np.int64]
"""Row numbers of training users, each once."""
Result = Mapping[str, Any]
"""What a part of a procedure returns: tensors, and values that JSON can hold (numbers, text, lists)."""


class Context(Protocol):
    """The part of the harness that ``run`` and ``before_training`` may use.

    state: of the training. seed: of the cell, or given to ``fork``. users: row numbers 0 .. U-1 of all training users.
    """

    state: StepState
    seed: int
    users: NDArray[np.int64]

    @property
    def folder(self) -> Path:
        """A folder of the cell that survives the process: empty at the first attempt, kept until one ends well."""

    def batches(self, users: Users | None = None) -> Iterator[Batch]:
        """Yield the training batches of ``users``, by default all, once, in an order of their own.

        Whole ones, as ``training_losses`` computes them: where several ranks train, each computes all of it.

        Raises ValueError for users that are no training users, or given twice.
        """

    def training_losses(self, steps: int) -> Iterator[Tensor]:
        """Yield the task's loss on ``steps`` training batches, for projections, importances and trials."""

    def train(self, epochs: int | None = None, users: Users | None = None, kind: PhaseKind = "train") -> None:
        """Train the method's stages under the task's settings, each with a new optimiser.

        Args:
            epochs: of all stages; by default the task's.
            users: the training users; by default all. Steps per epoch and schedule are those of these users.
            kind: of the phases. ``train`` is T and M: every epoch is validated, and training stops early. Any other
                kind trains all epochs without validation and leaves no epoch in the record.

        Raises:
            ValueError: users that are no training users, or given twice; fewer than one epoch.
        """

    def validate(self) -> Validation:
        """The model's quality now. As after an epoch, the test targets are ranked where it is the best so far."""

    def phase(self, kind: PhaseKind, name: str) -> AbstractContextManager[None]:
        """Measure the block as one phase; what begins a phase within it, other than ``train``, becomes part of it."""

    def fork(self, method: Method, seed: int) -> Context:
        """A fresh model of the cell on the same data, adapted by ``method``; with its own state, epochs and ranks."""

    def adopt(self, fork: Context) -> None:
        """Make the fork's model, method, state, epochs and ranks those of the cell, and release the cell's own.

        To train the final model, adopt it first: else both models count towards M.
        """

    def once(self, kind: PhaseKind, name: str, work: Callable[[], Result]) -> Result:
        """Do ``work`` in a phase and keep its result in ``folder``; an attempt after kill -9 reads it instead.

        The random generators are seeded by the seed and ``name`` for the work, and restored after it. Whatever else
        later parts need must be in the result; tensors come back on the host. The seconds of the work count towards
        the cell's total in whichever attempt they were spent.

        Raises ValueError for kind ``train``, and for a name that was used before.
        """


def fusion_parameters(task: TaskShape) -> int:
    """Parameters of the default item encoder: D d + d a head, and k d d + d where k > 1 encoders are fused."""
    heads = sum(shape.width * task.dim + task.dim for shape in task.encoders.values())
    k = len(task.encoders)
    return heads + (k * task.dim * task.dim + task.dim if k > 1 else 0)


class MethodConfig(Frozen):
    """Settings of a method; subclasses add fields, all with defaults."""


class Method:
    """One fine-tuning method. The class docstring gives its formula and source.

    Class attributes:
        Config: its settings.
        decoupled: it only reads hidden states of unmodified encoders, so the harness may cache all of them.
        baseline: it adapts no encoder; such rows get no TPME unless requested by name.
        modalities: the encoders it uses; ``None`` means those of the data set, an empty tuple none.
        needs: modalities it requires.
        groups: learning-rate groups of its own (``recommender.group`` puts parameters into them), for ``lr.groups``.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    decoupled: ClassVar[bool] = False
    baseline: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...] | None] = None
    needs: ClassVar[tuple[Modality, ...]] = ()
    groups: ClassVar[tuple[str, ...]] = ()
    identity_at_start: ClassVar[bool] = True
    """Before the first step, item vectors equal those of the frozen encoders with the same item encoder."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # --- structure ----------------------------------------------------------------------------------------------

    def item_encoder(self, task: TaskShape) -> ItemEncoder:
        """The module that maps hidden states to item vectors; default: last states, projected and fused."""
        return TokenFusion(task.encoders, task.dim)

    def initial_state(self, views: Mapping[Modality, EncoderView]) -> dict[str, Tensor]:
        """Parameters of the item encoder, by name, that start from the weights of unmodified encoders; default: none.

        Called for one encoder or for several at a time, on ``meta`` too, so what one encoder gives must not depend on
        another. Where states are cached, the builder of the cache calls it, and cells read what it has stored.

        Args:
            views: the unmodified encoders by modality; on any device.
        """
        return {}

    def frozen_encoders(self, modalities: Sequence[Modality]) -> tuple[Modality, ...]:
        """The encoders among ``modalities`` that stay unmodified; they get no gradients, and may be cached.

        Default: all of a decoupled method, none of another.
        """
        return tuple(modalities) if self.decoupled else ()

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Inject or replace modules and set which parameters train. Encoders arrive frozen, the rest trainable."""

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Formula: how many parameters train in the last stage, besides the sequential encoder.

        Written from sizes, not counted from what ``adapt`` made, so that one checks the other: ``tpme method check``
        compares them at a small and at the base shape. ``fusion_parameters`` is the default item encoder's part.

        Args:
            task: sizes of the task. views: the unmodified encoders by modality; none of a method without encoders.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula of its trainable parameters")

    def encode(self, model: Recommender, items: Items) -> Tensor:
        """Item vectors (n, d) of a set of items, in training and evaluation."""
        return model.encode_items(items)

    # --- optimiser ----------------------------------------------------------------------------------------------

    def param_groups(self, model: Recommender, lr: LearningRates) -> list[dict[str, Any]]:
        """The optimiser's groups: one each for recommender, text, image, the method's own parts, and named groups."""
        groups = model.parameter_groups()
        return [{"params": params, "lr": lr.of(name), "name": name} for name, params in groups.items()]

    def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """The optimiser of one stage; default: Adam without weight decay, as in IISAN."""
        return torch.optim.Adam(groups, fused=fused)

    # --- procedure ----------------------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the training, in order; default: one."""
        return (Stage(),)

    def begin_stage(self, state: StepState) -> None:
        """Called before a stage's optimiser is built; may change the structure and which parameters train."""

    def before_training(self, context: Context) -> None:
        """Called once before the first stage, outside the training time (phase ``estimate``)."""

    def run(self, context: Context) -> None:
        """Control the whole procedure; default: train the stages."""
        context.train()

    def before_step(self, state: StepState) -> None:
        """Called before the forward passes of a step."""

    def passes(self) -> tuple[str, ...]:
        """Names of the forward passes of a step, as passed to ``begin_pass``."""
        return ("task",)

    def begin_pass(self, name: str, model: Recommender) -> None:
        """Called before each forward pass."""

    def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
        """Terms of the loss, which are summed; default: the task's loss of every pass."""
        return {name: output.loss for name, output in outputs.items()}

    def after_backward(self, state: StepState) -> None:
        """Called with gradients unscaled and unclipped, before the optimiser steps."""

    def after_step(self, state: StepState, context: Context) -> None:
        """Called after the optimiser's step, before gradients are cleared; not on a skipped step."""

    def on_epoch_end(self, state: StepState) -> None:
        """Called after the last step of an epoch, inside the training time."""

    # --- result -------------------------------------------------------------------------------------------------

    def prepare_inference(self, model: Recommender) -> None:
        """Merge parts that training needed separate; item vectors must not change."""

    def state(self, model: Recommender) -> dict[str, Tensor]:
        """The tensors to store for the adapted model; default: the trainable parameters by name, not copied."""
        return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Load a ``state`` into a freshly adapted model, in which other parameters may train than in the last stage.

        Raises:
            KeyError: the state names something that is no parameter, or lacks one that trains.
            ValueError: a shape differs.
        """
        own = dict(model.named_parameters())
        trains = {name for name, value in own.items() if value.requires_grad}
        differing = sorted(set(state) - set(own) | trains - set(state))
        if differing:
            raise KeyError(f"state of another structure: '{differing[0]}' is only in one of state and model")
        with torch.no_grad():
            for name, value in state.items():
                if value.shape != own[name].shape:
                    shapes = f"{tuple(value.shape)} in the state, {tuple(own[name].shape)} here"
                    raise ValueError(f"state of another structure: '{name}' is {shapes}")
                own[name].copy_(value)

    def report(self, model: Recommender) -> dict[str, float]:
        """The method's own counters (ranks kept, tokens dropped ...), reported with the row."""
        return {}
