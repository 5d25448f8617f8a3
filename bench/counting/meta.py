"""The model of a cell on the ``meta`` device: every shape, no values, no weights, no data."""

from __future__ import annotations

import copy
import json
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
from tpme.bench.task.features import DTYPE, planned_bytes
from tpme.bench.task.items import EncoderShape, Items, map_tensors
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.sequential import SequentialEncoder
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule, StepState, TaskShape
from tpme.methods.registry import create

META = torch.device("meta")

BERT_BASE: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "type_vocab_size": 2,
    "max_position_embeddings": 512,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
"""BERT-base, uncased (Devlin et al., 2019; the released configuration): 108,891,648 parameters without the pooler."""
VIT_BASE: dict[str, Any] = {
    "model_type": "vit",
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
"""ViT-B/16 at 224 pixels (Dosovitskiy et al., 2021; the released configuration): 85,798,656 parameters, no pooler."""
KNOWN: dict[str, dict[str, Any]] = {
    "bert-base-uncased": BERT_BASE,
    "google-bert/bert-base-uncased": BERT_BASE,
    "google/vit-base-patch16-224": VIT_BASE,
}
"""Encoders whose shape is known here, so that planning the paper's matrix needs no network."""


class EncoderShelf:
    """Encoders on ``meta``: each configuration is built once and copied for every cell that adapts it."""

    def __init__(self) -> None:
        self._views: dict[str, EncoderView] = {}
        self._shapes: dict[str, EncoderShape] = {}

    def view(self, spec: EncoderSpec, modality: Modality) -> EncoderView:
        """A fresh, unadapted encoder. Raises UserError where its configuration cannot be had."""
        key = f"{modality} {spec.model_dump_json()}"
        if key not in self._views:
            with _configuration(spec) as found:
                self._views[key] = load_encoder(found, modality, device=META).view
        return copy.deepcopy(self._views[key])

    def shape(self, spec: EncoderSpec) -> EncoderShape:
        """Width and depth, from the configuration alone."""
        key = spec.model_dump_json()
        if key not in self._shapes:
            with _configuration(spec) as found:
                self._shapes[key] = encoder_shape(found)
        return self._shapes[key]


@contextmanager
def _configuration(spec: EncoderSpec) -> Iterator[EncoderSpec]:
    """Where to read an encoder's configuration: its own place, or a folder written from ``KNOWN``."""
    known = KNOWN.get(spec.source)
    if known is None or spec.revision is not None or Path(spec.source).is_dir():
        yield spec
        return
    with tempfile.TemporaryDirectory(prefix="tpme-") as folder:
        Path(folder, "config.json").write_text(json.dumps(known), encoding="utf-8")
        yield EncoderSpec(source=folder, weights="random")


class MetaCell:
    """What a cell trains, on ``meta``: method, adapted model and canonical batch.

    Args:
        cell: the settings. data: what the data set adds. shelf: where encoders come from; by default a new one.
        methods_path: folders with further methods.

    Raises:
        UserError: as the cell itself would: an unknown method, an encoder that is not to be had.
    """

    def __init__(
        self, cell: Cell, data: DataShape, shelf: EncoderShelf | None = None, methods_path: Sequence[Path] = ()
    ) -> None:
        shelf = shelf or EncoderShelf()
        self.cell, self.data = cell, data
        self.method: Method = create(cell.method, cell.options, methods_path)
        given = {"text": cell.text_encoder, "image": cell.image_encoder}
        used = cell.modalities if self.method.modalities is None else self.method.modalities
        self.specs: dict[Modality, EncoderSpec] = {m: spec for m in used if (spec := given[m]) is not None}
        self.shapes = {modality: shelf.shape(spec) for modality, spec in self.specs.items()}
        views = {} if cell.cached else {m: shelf.view(spec, m) for m, spec in self.specs.items()}
        training = cell.training
        whole = -(-data.users // training.users_per_batch)
        self.steps = min(whole, training.max_steps_per_epoch or whole)
        self.schedule = Schedule(training.epochs, self.steps, data.popularity)
        with torch.random.fork_rng(devices=[]), META:
            item_encoder = self.method.item_encoder(TaskShape(training.embedding_dim, data.items, self.shapes))
            sequence = SequentialEncoder(
                training.embedding_dim, data.max_seq_len, training.blocks, training.heads, training.dropout
            )
            self.model = Recommender(views, item_encoder, sequence, decoupled=self.method.decoupled)
            self.method.adapt(self.model, self.schedule)
        for view in self.model.views.values():
            if training.activation_checkpointing:
                view.checkpoint_activations()
        self.model.to(META)
        self.state = StepState(self.model, self.schedule, epoch=1, stage=self.method.stages()[0])
        self.method.begin_stage(self.state)
        self.model.train()
        self.batch = self._batch()

    @property
    def cache_bytes(self) -> int | None:
        """Size of the feature cache it trains on."""
        return planned_bytes(self.data.items, self.shapes, self.model.item_encoder.reads) if self.cell.cached else None

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
        self._of = cell

    def gather(self, ids: Any) -> Items:
        of, n = self._of, len(ids)
        index = torch.from_numpy(ids)
        if of.cell.cached:
            dtype = getattr(torch, DTYPE)
            reads = of.model.item_encoder.reads
            shapes = {m: (n, reads[m].count, of.shapes[m].width) for m in reads}
            return Items(index, states={m: torch.empty(s, dtype=dtype, device=META) for m, s in shapes.items()})
        tokens = mask = image = None
        if "text" in of.model.views:
            shape = n, of.cell.training.title_tokens
            tokens, mask = (torch.empty(shape, dtype=torch.int64, device=META) for _ in range(2))
        if "image" in of.model.views:
            side = _side(of.model.views["image"].module)
            image = torch.empty(n, 3, side, side, dtype=torch.uint8, device=META)
        return Items(index, tokens, mask, image)


def _side(module: nn.Module) -> int:
    config: Any = module.config
    return int(config.image_size if isinstance(config.image_size, int) else config.image_size[0])
