"""The model of a cell on the ``meta`` device: every shape, no values, no weights, no data."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpme.bench.counting.batch import DataShape, canonical_slots
from tpme.bench.record import Cell, EncoderSpec, Modality
from tpme.bench.task.batches import Batch, ItemStore, build_batch
from tpme.bench.task.encoders import encoder_shape, load_encoder
from tpme.bench.task.features import DTYPE
from tpme.bench.task.items import EncoderShape, Items, map_tensors
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import ModelBuilder, encoder_specs
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

    with tempfile.TemporaryDirectory(prefix="tpme-") as folder:
        AutoConfig.for_model(released).save_pretrained(folder)
        yield spec.model_copy(update={"source": folder, "weights": "random"})


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
        self.shapes = {modality: encoders.shape(spec, modality) for modality, spec in specs.items()}
        views = {} if cell.cached else {modality: encoders.view(spec, modality) for modality, spec in specs.items()}
        with torch.random.fork_rng(devices=[]), META:
            builder = ModelBuilder(self.method, cell.training, data, self.shapes)
            self.model = builder.build(views)
        self.schedule = builder.schedule
        self.cache_bytes = builder.cache_bytes if cell.cached else None
        """Size of the feature cache that the cell trains on; ``None`` where it trains on encoders."""
        self.model.to(META)
        self.state = StepState(self.model, self.schedule, epoch=1, stage=self.method.stages()[0])
        self.method.begin_stage(self.state)
        self.model.train()
        self.batch = self._batch()

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
        cell, model, n = self._meta.cell, self._meta.model, len(ids)
        index = torch.from_numpy(ids)
        if cell.cached:
            dtype = getattr(torch, DTYPE)
            reads = model.item_encoder.reads
            shapes = {m: (n, reads[m].count, self._meta.shapes[m].width) for m in reads}
            return Items(index, states={m: torch.empty(s, dtype=dtype, device=META) for m, s in shapes.items()})
        tokens = mask = image = None
        if "text" in model.views:
            shape = n, cell.training.title_tokens
            tokens, mask = (torch.empty(shape, dtype=torch.int64, device=META) for _ in range(2))
        if "image" in model.views:
            side = _side(model.views["image"].module)
            image = torch.empty(n, 3, side, side, dtype=torch.uint8, device=META)
        return Items(index, tokens, mask, image)


def _side(module: nn.Module) -> int:
    config: Any = module.config
    return int(config.image_size if isinstance(config.image_size, int) else config.image_size[0])
