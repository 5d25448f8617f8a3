"""The model of a cell on the ``meta`` device: every shape, no values, no weights, no data."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpme.bench.counting.batch import DataShape, canonical_slots
from tpme.bench.record import Cell, EncoderSpec, Modality
from tpme.bench.task.batches import Batch, ItemStore, build_batch
from tpme.bench.task.encoders import encoder_shape, load_encoder
from tpme.bench.task.features import DTYPE, planned_bytes
from tpme.bench.task.items import EncoderShape, Items, States, map_tensors
from tpme.bench.task.precomputed import StatesFile
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import EncoderUse, ModelBuilder, encoder_specs
from tpme.methods.base import Method, StepState
from tpme.methods.registry import create

META = torch.device("meta")

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

    def shape(self, spec: EncoderSpec) -> EncoderShape:
        """Width and depth, from the configuration alone."""
        key = spec.model_dump_json()
        if key not in self._shapes:
            with _configuration(spec) as source:
                self._shapes[key] = encoder_shape(source)
        return self._shapes[key]


@contextmanager
def _configuration(spec: EncoderSpec) -> Iterator[EncoderSpec]:
    """Where to read an encoder's configuration: at its source, or in a folder written from transformers' defaults."""
    released = RELEASED.get(spec.source)
    if released is None or spec.revision is not None or Path(spec.source).is_dir():
        yield spec
        return
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="tpme-") as folder:
        AutoConfig.for_model(released).save_pretrained(folder)
        yield EncoderSpec(source=folder, weights="random")


class MetaCell:
    """The method, adapted model and canonical batch of a cell, on ``meta``.

    Args:
        cell: the settings. data: what the data set adds. encoders: where encoders come from; by default new ones.
        methods_path: folders with further methods.

    Raises:
        UserError: as the cell itself would: an unknown method, an encoder that is not available.
    """

    def __init__(
        self, cell: Cell, data: DataShape, encoders: MetaEncoders | None = None, methods_path: Sequence[Path] = ()
    ) -> None:
        encoders = encoders or MetaEncoders()
        self.cell, self.data = cell, data
        self.method: Method = create(cell.method, cell.options, methods_path)
        specs = encoder_specs(cell, self.method)
        self.use, self.encoders = EncoderUse.of(cell, self.method), encoders
        self.shapes = {modality: encoders.shape(spec) for modality, spec in specs.items()}
        views = {modality: encoders.view(spec, modality) for modality, spec in self.use.run.items()}
        with torch.random.fork_rng(devices=[]), META:
            builder = ModelBuilder(self.method, cell.training, data, self.shapes)
            self.model = builder.build(views)
        self.schedule = builder.schedule
        self.cache_bytes = {m: planned_bytes(data.items, self.states(m, 1)) for m in self.use.cached}
        """Size of the feature cache of each encoder that has one."""
        self.given_bytes = sum(planned_bytes(data.items, self.states(m, 1)) for m in self.use.given)
        """Size of the precomputed states that the cell reads."""
        self.model.to(META)
        self.state = StepState(self.model, self.schedule, epoch=1, stage=self.method.stages()[0])
        self.method.begin_stage(self.state)
        self.model.train()
        self.batch = self._batch()

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
