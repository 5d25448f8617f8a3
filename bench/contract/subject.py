"""The subject of the contract suite: a method with options on a pair of encoders, and what the suite trains of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from tpme.bench.contract.expect import ContractError, NotApplicable
from tpme.bench.contract.watch import Watch
from tpme.bench.contract.world import PAIRS, TITLE_TOKENS, Pair, SmallWorld
from tpme.bench.errors import UserError, one_line
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Cell, EncoderSpec, LearningRates, Modality, Training
from tpme.bench.run.cell import CellRun
from tpme.bench.run.job import Job
from tpme.bench.task.batches import Batch
from tpme.bench.task.items import Items
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import used_modalities
from tpme.bench.train.loop import Trainer
from tpme.methods.base import Method, TaskShape
from tpme.methods.registry import create

TRAINING = Training(
    epochs=2, users_per_batch=10, embedding_dim=8, title_tokens=TITLE_TOKENS, max_steps_per_epoch=3, dropout=0.3
)
RATES = LearningRates(recommender=1e-2, text=1e-2, image=1e-2, method=1e-2)


@dataclass(frozen=True)
class Trained:
    """A method after its whole procedure. watch: what the training did. error: what ended it early."""

    trainer: Trainer
    watch: Watch
    error: Exception | None = None


@dataclass
class Subject:
    """A method with options, on encoders of the families ``pair``, of which it is given ``modalities``."""

    world: SmallWorld
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    modalities: tuple[Modality, ...] = ("text", "image")
    pair: Pair = PAIRS[0]
    methods_path: tuple[Path, ...] = ()

    def __str__(self) -> str:
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        families = [self._families[modality] for modality in self.used]
        return f"{self.name}{options}{' on ' if families else ''}{' + '.join(families)}"

    @property
    def _families(self) -> dict[Modality, str]:
        return {"text": self.pair[0], "image": self.pair[1]}

    # --- building it ----------------------------------------------------------------------------------------------

    def method(self, **options: Any) -> Method:
        """A new instance; ``options`` are laid over the subject's."""
        return create(self.name, self.options | options, self.methods_path)

    @cached_property
    def used(self) -> tuple[Modality, ...]:
        """The modalities whose encoders the method uses."""
        return used_modalities(self.method(), self.modalities)

    @cached_property
    def _training(self) -> Training:
        """``TRAINING``, with an epoch for every stage."""
        return TRAINING.model_copy(update={"epochs": max(TRAINING.epochs, len(self.method().stages()))})

    @cached_property
    def frozen(self) -> tuple[Modality, ...]:
        """The modalities whose encoders the method declares to be frozen."""
        return self.method().frozen_encoders(self.used)

    @property
    def specs(self) -> dict[Modality, EncoderSpec]:
        """The encoders that it uses."""
        return {modality: self.world.encoder(self._families[modality]) for modality in self.used}

    @property
    def fresh_views(self) -> dict[Modality, EncoderView]:
        """The unadapted encoders; callers must not change them."""
        return {modality: self.world.fresh_view(self._families[modality]) for modality in self.used}

    def cell(self, *, seed: int = 1, protocol: Literal["suite", "paper"] = "suite", cached: bool = False) -> Cell:
        """The settings under which the method is trained."""
        specs = self.specs
        return Cell(
            method=self.name,
            options=self.options,
            dataset="synthetic",
            dataset_fingerprint=self.world.dataset.manifest.fingerprint,
            modalities=self.modalities,
            text_encoder=specs.get("text"),
            image_encoder=specs.get("image"),
            training=self._training,
            lr=RATES,
            seed=seed,
            protocol=protocol,
            cached=cached,
        )

    def job(self, cell: Cell) -> Job:
        """One attempt at ``cell``, in a folder of its own."""
        return Job(
            cell=cell,
            cell_id="contract",
            code_version="contract",
            dataset_path=self.world.data,
            store=self.world.store,
            folder=self.world.attempt_folder(),
            methods_path=self.methods_path,
            cache_limit_bytes=2**30,
            time_limit_s=3600.0,
        )

    def trainer(self, cell: Cell | None = None, **training: Any) -> Trainer:
        """A new trainer, as the process of a cell builds it; ``training`` changes settings of ``cell``."""
        cell = cell or self.cell()
        cell = cell.model_copy(update={"training": cell.training.model_copy(update=training)})
        return CellRun(self.job(cell), PhaseLog("cpu", None, None), _silent).prepare()

    def train(self, cell: Cell | None = None, **training: Any) -> Trained:
        """Train by the method's whole procedure in the real trainer, watched."""
        trainer = self.trainer(cell, **training)
        watch = Watch(trainer)
        error: Exception | None = None
        with watch:
            try:
                trainer.run()
            except Exception as failure:
                error = failure
        return Trained(trainer, watch, error)

    @cached_property
    def trained(self) -> Trained:
        """The method after its whole procedure; checks must not change it.

        Raises:
            NotApplicable: the training failed, which is a check of its own.
        """
        trained = self.first_training
        if trained.error is not None:
            raise NotApplicable(f"its training failed: {one_line(trained.error)}")
        return trained

    @cached_property
    def first_training(self) -> Trained:
        """The method after its whole procedure, also where that failed."""
        return self.train()

    def copy_of_trained(self) -> tuple[Method, Recommender]:
        """A copy of the trained method and model, for checks that change them."""
        trainer = self.trained.trainer
        try:
            return copy.deepcopy((trainer.method, trainer.model))
        except RuntimeError as error:
            raise ContractError(
                "after training, method and model cannot be copied; let go of tensors with a graph once losses() has "
                f"read them ({one_line(error)})"
            ) from None

    # --- its inputs -----------------------------------------------------------------------------------------------

    def items(self, trainer: Trainer, ids: list[int] | None = None) -> Items:
        """Inputs of items ``ids``, by default of the whole catalogue, as ``trainer`` reads them."""
        wanted = range(1, self.world.dataset.manifest.items + 1) if ids is None else ids
        return trainer.store.gather(np.array(wanted, dtype=np.int64)).to(trainer.device)

    def batch(self, trainer: Trainer) -> Batch:
        """The first of the training batches."""
        return next(trainer.batches())

    @cached_property
    def task(self) -> TaskShape:
        """The sizes that the method is given."""
        shapes = {modality: view.shape for modality, view in self.fresh_views.items()}
        return TaskShape(TRAINING.embedding_dim, self.world.dataset.manifest.items, shapes, TITLE_TOKENS)

    @cached_property
    def refusal(self) -> str | None:
        """The error message of a method that cannot be built on these encoders; ``None`` if it can."""
        try:
            self.trainer()
        except UserError as error:
            return str(error)
        return None

    @cached_property
    def alternatives(self) -> list[dict[str, Any]]:
        """Options that differ from the subject's in one field each, with a value made from the field's type."""
        config = self.method().config
        found = []
        for place, (name, info) in enumerate(type(config).model_fields.items(), start=2):
            for value in _other_values(getattr(config, name), info.annotation, place):
                if self._accepts({name: value}):
                    found.append({name: value})
                    break
        return found

    @cached_property
    def other_options(self) -> dict[str, Any]:
        """As many of the alternatives as fit together; empty for a method without options."""
        options: dict[str, Any] = {}
        for alternative in self.alternatives:
            if self._accepts(options | alternative):
                options |= alternative
        return options

    def _accepts(self, options: dict[str, Any]) -> bool:
        try:
            self.method(**options)
        except UserError:
            return False
        return with_options(self, options).refusal is None


def with_options(subject: Subject, options: Mapping[str, Any]) -> Subject:
    """The same method on the same encoders, ``options`` laid over its own."""
    return replace(subject, options={**subject.options, **options})


def vectors(method: Method, model: Recommender, items: Items) -> Tensor:
    """Item vectors (n, d) in eval mode."""
    with torch.no_grad():
        return method.encode(model.eval(), items)


def _other_values(value: Any, annotation: Any, factor: int) -> list[Any]:
    """Candidates for another value of an option: the other boolean or choice, a part or a multiple of a number.

    ``factor`` differs between the options of a method, so that their ratios (a rank and its scale) change, too.
    """
    choices = [choice for part in _parts(annotation) for choice in get_args(part) if get_origin(part) is Literal]
    if choices and not isinstance(value, tuple):
        return [choice for choice in choices if choice != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value // factor or factor * value, factor * value, value + 1, value - 1]
    if isinstance(value, float):
        return [value / factor, factor * value] if value else [0.25, 1.0]
    if isinstance(value, tuple):
        return [value[:-1], *((*value, choice) for choice in choices if choice not in value)]
    return [1, 0.5] if value is None else []


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _silent(_what: str, _share: float) -> None:
    """Ignore progress."""
