"""The recipe of a model: from a method, training settings and the size of a data set to the adapted recommender.

The run of a cell and its counters on ``meta`` both follow it, so what is planned is what is trained.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec, Modality, Training
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.sequential import SequentialEncoder
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule, TaskShape


@dataclass(frozen=True)
class DataSize:
    """What a model depends on of its data set.

    users, items: how many there are. max_seq_len: longest input L. popularity: (N+1,) training share of each item.
    """

    users: int
    items: int
    max_seq_len: int
    popularity: NDArray[np.float64]

    @classmethod
    def of(cls, dataset: Dataset) -> DataSize:
        """The size of a prepared data set."""
        manifest = dataset.manifest
        return DataSize(manifest.users, manifest.items, manifest.max_seq_len, dataset.popularity)


def seed_generators(seed: int) -> None:
    """Seed every generator that a method may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextmanager
def separate_generators(name: str, device: torch.device) -> Iterator[None]:
    """Seed the random generators by ``name`` for the block, and restore them after it."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generators(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def steps_per_epoch(users: int, training: Training) -> int:
    """Training steps of an epoch over ``users`` users; the last batch may be smaller than the others."""
    whole = -(-users // training.users_per_batch)
    return min(whole, training.max_steps_per_epoch or whole)


def schedule_of(training: Training, data: DataSize) -> Schedule:
    """What a method may know of its training."""
    return Schedule(training.epochs, steps_per_epoch(data.users, training), data.popularity, training.title_tokens)


def used_modalities(method: Method, modalities: Sequence[Modality]) -> tuple[Modality, ...]:
    """The modalities whose encoders ``method`` uses; ``modalities`` are those of the cell."""
    return tuple(modalities) if method.modalities is None else method.modalities


def starts_from_weights(method: Method) -> bool:
    """Whether parts of the method's item encoder may start from the encoders' weights (``initial_state``)."""
    return type(method).initial_state is not Method.initial_state


def encoder_specs(cell: Cell, method: Method) -> dict[Modality, EncoderSpec]:
    """The encoders of ``cell`` that ``method`` uses."""
    specs: dict[Modality, EncoderSpec | None] = {"text": cell.text_encoder, "image": cell.image_encoder}
    return {m: spec for m in used_modalities(method, cell.modalities) if (spec := specs[m]) is not None}


@dataclass(frozen=True)
class EncoderUse:
    """The encoders of a cell, by the origin of their hidden states.

    run: encoders that run in every step. cached: frozen ones, in the feature cache. given: files of states.
    """

    run: Mapping[Modality, EncoderSpec]
    cached: Mapping[Modality, EncoderSpec]
    given: Mapping[Modality, EncoderSpec]

    @classmethod
    def of(cls, cell: Cell, method: Method) -> EncoderUse:
        """How ``cell`` uses the encoders. Raises UserError where ``method`` adapts one that is only a file."""
        specs = encoder_specs(cell, method)
        frozen = method.frozen_encoders(tuple(specs))
        given = {modality: spec for modality, spec in specs.items() if spec.precomputed}
        for modality, spec in given.items():
            if modality not in frozen:
                raise UserError(
                    f"method '{cell.method}' adapts the {modality} encoder, but '{spec.source}' holds only its states; "
                    "name an encoder, or a method that leaves it frozen (iisan, frozen)"
                )
        cached = {m: spec for m, spec in specs.items() if cell.cached and m in frozen and m not in given}
        return cls({m: spec for m, spec in specs.items() if m not in given | cached}, cached, given)


def check_passes(name: str, method: Method) -> None:
    """Raise UserError where activations cannot be recomputed, because a step of the method ``name`` has several passes.

    In the backward pass, layers would be recomputed with what ``begin_pass`` has set for the last pass.
    """
    passes = method.passes()
    if len(passes) > 1:
        raise UserError(
            f"method '{name}' has {len(passes)} passes a step ({', '.join(passes)}): layers recomputed in the "
            "backward pass would mix them up; set activation_checkpointing = false"
        )


class ModelBuilder:
    """Builds a model in two steps, because inputs and encoders are loaded between them.

    The constructor initialises what is trained from scratch, with random numbers drawn for the item encoder first and
    for the sequential encoder second. ``build`` adds the encoders and adapts the model.

    Args:
        method, training: of the cell. data: size of its data set. shapes: of the encoders that the method uses.

    Raises UserError where the method reads a token that does not stand for the item.
    """

    def __init__(
        self, method: Method, training: Training, data: DataSize, shapes: Mapping[Modality, EncoderShape]
    ) -> None:
        self.method, self.training, self.data, self.shapes = method, training, data, shapes
        self.schedule = schedule_of(training, data)
        task = TaskShape(training.embedding_dim, data.items, shapes, training.title_tokens)
        self.item_encoder = method.item_encoder(task)
        for modality, reads in self.item_encoder.reads.items():
            shapes[modality].check(reads, f"the {modality} encoder")
        self.sequence = SequentialEncoder(
            training.embedding_dim, data.max_seq_len, training.blocks, training.heads, training.dropout
        )

    def build(
        self,
        views: Mapping[Modality, EncoderView],
        seed: int | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> Recommender:
        """The model, adapted by the method.

        Args:
            views: the encoders that run. seed: of the adaptation; what loading the
                encoders drew must not make cached and uncached rows differ. ``None`` leaves the generators alone.
            initial: what the method's ``initial_state`` gave for the encoders that do not run.

        Raises:
            ValueError: an initial state that the item encoder has no parameter for.
        """
        state = self.method.initial_state(views) | dict(initial or {})
        unknown = self.item_encoder.load_state_dict(state, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"initial_state() names '{unknown[0]}', which the item encoder does not have")
        frozen = self.method.frozen_encoders(tuple(self.shapes))
        model = Recommender(views, self.item_encoder, self.sequence, frozen=frozen)
        if seed is not None:
            seed_generators(seed)
        self.method.adapt(model, self.schedule)
        if self.training.activation_checkpointing:
            for view in model.views.values():
                view.checkpoint_activations()
        return model
