"""The method contract: everything a fine-tuning method may decide, and what it gets for free.

A method is one module with a configuration model and one class. Every hook has a default, so a simple method is a few
lines: BitFit overrides ``adapt`` alone. The training settings (batch, epochs, data, precision, schedule) belong to the
task; no hook can change them for the other rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.record import Frozen, LearningRates, Modality
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.recommender import ItemEncoder, Recommender, TokenFusion


@dataclass(frozen=True)
class TaskShape:
    """What a method may know before anything is loaded.

    dim: width d of item and user vectors. items: N, ids run from 1. encoders: shape of each encoder by modality.
    """

    dim: int
    items: int
    encoders: Mapping[Modality, EncoderShape]


@dataclass(frozen=True)
class Schedule:
    """What a method may know of the training ahead.

    popularity: (N+1,) share of each item among the training interactions; entry 0 is padding.
    """

    epochs: int
    steps_per_epoch: int
    popularity: NDArray[np.float64]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run, if it does not stop early."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class PassOutput:
    """One forward pass over a batch.

    loss: scalar. logits: (V, C) over the in-batch candidates. target: (V,), their correct columns.
    """

    loss: Tensor
    logits: Tensor
    target: Tensor


@dataclass(frozen=True)
class Stage:
    """A part of the training with an optimiser, a schedule and phases of its own; shares of the epochs sum to 1."""

    name: str = ""
    share: float = 1.0


@dataclass
class StepState:
    """Where the training stands, as hooks see it. ``step`` counts optimiser steps from 0 over the whole run."""

    model: Recommender
    schedule: Schedule
    epoch: int = 0
    step: int = 0
    stage: Stage = field(default_factory=Stage)
    skipped: bool = False
    """The gradient scaler dropped this step because a gradient overflowed."""


class Context(Protocol):
    """What ``run`` and ``before_training`` may use of the harness."""

    state: StepState

    def train(self) -> None:
        """Train by the method's stages, under the task's settings."""

    def training_losses(self, steps: int) -> Iterable[Tensor]:
        """The task's loss on ``steps`` training batches, for projections, importances and trials."""


class MethodConfig(Frozen):
    """Settings of a method; subclasses add fields, all with defaults."""


class Method:
    """One fine-tuning method. The class docstring gives its formula and source.

    Class attributes:
        Config: its settings.
        decoupled: it only reads hidden states of untouched encoders, so the harness may cache them.
        baseline: it adapts no encoder; such rows get no TPME unless they are named.
        modalities: the encoders it uses; ``None`` means those of the data set, an empty tuple none.
        needs: modalities it cannot do without.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    decoupled: ClassVar[bool] = False
    baseline: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...] | None] = None
    needs: ClassVar[tuple[Modality, ...]] = ()
    identity_at_start: ClassVar[bool] = True
    """Before the first step item vectors equal those of the frozen encoders under the same item encoder."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # --- structure ----------------------------------------------------------------------------------------------

    def item_encoder(self, task: TaskShape) -> ItemEncoder:
        """How hidden states become an item vector; default: token 0 of each, projected, concatenated, fused."""
        return TokenFusion(task.encoders, task.dim)

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Inject or replace modules and set what trains. Encoders arrive frozen, the rest trainable."""

    # --- optimiser ----------------------------------------------------------------------------------------------

    def param_groups(self, model: Recommender, lr: LearningRates) -> list[dict[str, Any]]:
        """Optimiser groups: one learning rate each for recommender, text, image and the method's own parts."""
        groups = model.parameter_groups()
        return [{"params": params, "lr": getattr(lr, name), "name": name} for name, params in groups.items()]

    def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """The optimiser of one stage; default Adam without weight decay, as IISAN trains."""
        return torch.optim.Adam(groups, fused=fused)

    # --- procedure ----------------------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """The parts of the training, in order; default one."""
        return (Stage(),)

    def begin_stage(self, state: StepState) -> None:
        """Called before a stage's optimiser is built: it may change the structure and what trains."""

    def before_training(self, context: Context) -> None:
        """Called once, before the first stage; outside the training time, in a phase of its own (``estimate``)."""

    def run(self, context: Context) -> None:
        """Own the whole procedure; default: train by stages."""
        context.train()

    def before_step(self, state: StepState) -> None:
        """Called before the forward passes of a step."""

    def passes(self) -> tuple[str, ...]:
        """Names of the forward passes of a step; ``begin_pass`` is told which one starts."""
        return ("task",)

    def begin_pass(self, name: str, model: Recommender) -> None:
        """Called before each forward pass."""

    def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
        """Terms of the loss, summed; default: the task's loss of every pass."""
        return {name: output.loss for name, output in outputs.items()}

    def after_backward(self, state: StepState) -> None:
        """Called with gradients unscaled and unclipped, before the optimiser steps."""

    def after_step(self, state: StepState, context: Context) -> None:
        """Called after the optimiser stepped, before gradients are cleared; never on a skipped step."""

    def on_epoch_end(self, state: StepState) -> None:
        """Called after the last step of an epoch, inside the training time."""

    # --- result -------------------------------------------------------------------------------------------------

    def prepare_inference(self, model: Recommender) -> None:
        """Merge, fold or gather what need not stay separate; item vectors must not change."""

    def state(self, model: Recommender) -> dict[str, Tensor]:
        """What must be kept to use the adapted model; default: the trainable parameters, by name, not copied."""
        return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Put a ``state`` back into a freshly adapted model.

        Raises:
            KeyError: a parameter that trains is not in it, or it holds one that does not train here.
            ValueError: a shape does not fit.
        """
        own = {name: value for name, value in model.named_parameters() if value.requires_grad}
        differing = sorted(set(state) ^ set(own))
        if differing:
            raise KeyError(f"state of another structure: '{differing[0]}' is only in one of state and model")
        with torch.no_grad():
            for name, value in state.items():
                if value.shape != own[name].shape:
                    here, there = tuple(own[name].shape), tuple(value.shape)
                    raise ValueError(f"state of another structure: '{name}' is {there} in the state, {here} here")
                own[name].copy_(value)

    def report(self, model: Recommender) -> dict[str, float]:
        """Counters of its own (ranks kept, tokens dropped ...), shown beside the row."""
        return {}
