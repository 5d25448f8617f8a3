"""The model of a cell on the ``meta`` device: every shape, no values, no weights, no data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpme.bench.claims import scratch_folder
from tpme.bench.counting.batch import DataShape, canonical_slots
from tpme.bench.counting.structure import META, structure_of
from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec, Modality
from tpme.bench.task.batches import Batch, ItemStore, build_batch
from tpme.bench.task.encoders import encoder_shape, load_encoder
from tpme.bench.task.features import DTYPE, planned_bytes
from tpme.bench.task.items import EncoderShape, Items, States, map_tensors
from tpme.bench.task.precomputed import StatesFile
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import EncoderUse, ModelBuilder, encoder_specs, starts_from_weights
from tpme.bench.train.loop import Trainer
from tpme.methods.base import Method, StepState
from tpme.methods.registry import create

RELEASED: dict[str, str] = {
    "bert-base-uncased": "bert",
    "google-bert/bert-base-uncased": "bert",
    "google/vit-base-patch16-224": "vit",
}
"""Encoders whose configuration is transformers' default for this model type, so planning them needs no network."""


class MetaEncoders:
    """Encoders on ``meta``: each configuration is built once and copied for every cell that adapts it."""

    def __init__(self) -> None:
        self._views: dict[str, EncoderView] = {}
        self._shapes: dict[str, EncoderShape] = {}

    def view(self, spec: EncoderSpec, modality: Modality) -> EncoderView:
        """A fresh, unadapted encoder. Raises UserError where its configuration is not available."""
        key = f"{modality} {spec.model_dump_json()}"
        if key not in self._views:
            with _configuration(spec) as source:
                self._views[key] = load_encoder(source, modality, device=META).view
        return copy.deepcopy(self._views[key])

    def shape(self, spec: EncoderSpec, modality: Modality) -> EncoderShape:
        """Width, depth and pooling, from the configuration alone."""
        key = f"{modality} {spec.model_dump_json()}"
        if key not in self._shapes:
            with _configuration(spec) as source:
                self._shapes[key] = encoder_shape(source, modality)
        return self._shapes[key]


@contextmanager
def _configuration(spec: EncoderSpec) -> Iterator[EncoderSpec]:
    """Where to read an encoder's configuration: at its source, or in a folder written from transformers' defaults."""
    released = RELEASED.get(spec.source)
    if released is None or spec.revision is not None or Path(spec.source).is_dir():
        yield spec
        return
    from transformers import AutoConfig

    with scratch_folder("encoder") as (folder, _):
        AutoConfig.for_model(released).save_pretrained(folder)
        yield spec.model_copy(update={"source": str(folder), "weights": "random"})


@contextmanager
def _named(method: str) -> Iterator[None]:
    """Let errors of the user say which method of the matrix they are about."""
    try:
        yield
    except UserError as error:
        message = str(error)
        raise UserError(message if f"'{method}'" in message else f"method '{method}': {message}") from None


class MetaCell:
    """The method, adapted model and canonical batch of a cell, on ``meta``.

    Args:
        cell: the settings. data: what the data set adds. encoders: where encoders come from; by default new ones.
        methods_path: folders with further methods. of: a method and its state, whose model is copied; by default both
            are new, and every stage is entered, up to the last.

    Raises:
        UserError: as the cell itself would: an unknown method, an encoder that is not available.
    """

    def __init__(
        self,
        cell: Cell,
        data: DataShape,
        encoders: MetaEncoders | None = None,
        methods_path: Sequence[Path] = (),
        *,
        of: tuple[Method, StepState] | None = None,
    ) -> None:
        encoders = encoders or MetaEncoders()
        self.cell, self.data = cell, data
        self.method = of[0] if of else create(cell.method, cell.options, methods_path)
        specs = encoder_specs(cell, self.method)
        self.use, self.encoders = EncoderUse.of(cell, self.method), encoders
        self.shapes = {modality: encoders.shape(spec, modality) for modality, spec in specs.items()}
        self.state = of[1] if of else self._started()
        self.model, self.schedule = self.state.model, self.state.schedule
        self.cache_bytes = {m: planned_bytes(data.items, self.states(m, 1)) for m in self.use.cached}
        """Size of the feature cache of each encoder that has one."""
        self.given_bytes = sum(planned_bytes(data.items, self.states(m, 1)) for m in self.use.given)
        """Size of the precomputed states that the cell reads."""
        self.model.train()
        self.batch = self._batch()

    @classmethod
    def trained(cls, trainer: Trainer, data: DataShape) -> MetaCell:
        """The cell with the structure that training has left; the trainer's own model and method stay as they are."""
        return cls(trainer.cell, data, of=structure_of(trainer))

    def _started(self) -> StepState:
        views = {modality: self.encoders.view(spec, modality) for modality, spec in self.use.run.items()}
        with torch.random.fork_rng(devices=[]), META, _named(self.cell.method):
            builder = ModelBuilder(self.method, self.cell.training, self.data, self.shapes)
            model = builder.build(views, initial=self._initial_state()).to(META)
            state = StepState(model, builder.schedule, epoch=1)
            for stage in self.method.stages():
                state.stage = stage
                self.method.begin_stage(state)
        model.to(META)  # what a stage has added
        return state

    def _initial_state(self) -> dict[str, Tensor]:
        """What the builder of the feature cache would take from the weights of cached encoders."""
        if not starts_from_weights(self.method):
            return {}
        return self.method.initial_state({m: self.encoders.view(spec, m) for m, spec in self.use.cached.items()})

    @torch.no_grad()
    def states(self, modality: Modality, n: int) -> States:
        """The states of ``n`` items of an encoder that does not run, as they are stored."""
        reads, shape = self.model.item_encoder.reads[modality], self.shapes[modality]
        if reads.tokens == "pooled":
            given = self.use.given.get(modality)
            dtype = StatesFile.open(given).dtype if given else DTYPE
            return torch.empty((n, reads.count, shape.width), dtype=dtype, device=META)
        view = self.encoders.view(self.use.cached[modality], modality)
        items = _inputs({modality: view}, torch.arange(n), self.cell.training.title_tokens)
        states = view.encode(reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image)
        return map_tensors(states, lambda tensor: tensor.to(DTYPE) if tensor.is_floating_point() else tensor)

    def describe(self) -> str:
        """The canonical batch in words."""
        users, distinct = self.batch.slot.shape[0], self.batch.candidates.distinct
        words = [f"{users} users", f"{self.filled} filled slots", f"{distinct} distinct items"]
        if self.batch.items.tokens is not None:
            words.append(f"{self.batch.items.tokens.shape[1]} tokens")
        if self.batch.items.image is not None:
            words.append(f"{self.batch.items.image.shape[-1]} pixels")
        return f"{', '.join(words)}; lengths: {self.data.source}"

    def _batch(self) -> Batch:
        slots = canonical_slots(self.data, self.cell.training.users_per_batch)
        self.filled = int((slots > 0).sum())
        log_p = torch.zeros(int(slots.max()) + 1).numpy()
        return map_tensors(build_batch(slots, log_p, _MetaStore(self), self.cell.protocol), lambda t: t.to(META))


class _MetaStore(ItemStore):
    """Item inputs without content."""

    def __init__(self, cell: MetaCell) -> None:
        self._meta = cell

    def gather(self, ids: Any) -> Items:
        cell = self._meta
        items = _inputs(cell.model.views, torch.from_numpy(ids), cell.cell.training.title_tokens)
        states = {modality: cell.states(modality, len(ids)) for modality in (*cell.use.cached, *cell.use.given)}
        return replace(items, states=states or None)


def _inputs(views: Mapping[Modality, EncoderView], ids: Tensor, title_tokens: int) -> Items:
    """The inputs of items ``ids`` (n,) for these encoders, without content."""
    tokens = mask = image = None
    if "text" in views:
        tokens, mask = (torch.empty((len(ids), title_tokens), dtype=torch.int64, device=META) for _ in range(2))
    if "image" in views:
        side = _side(views["image"].module)
        image = torch.empty(len(ids), 3, side, side, dtype=torch.uint8, device=META)
    return Items(ids, tokens, mask, image)


def _side(module: nn.Module) -> int:
    config: Any = module.config
    return int(config.image_size if isinstance(config.image_size, int) else config.image_size[0])
