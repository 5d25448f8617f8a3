"""Small stand-ins for the tests of task and methods: encoders, a catalogue, a recommender, a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from tpme.bench.record import LearningRates, Modality, Training
from tpme.bench.task.batches import Batch, ItemStore, build_batch, log_popularity
from tpme.bench.task.items import Items
from tpme.bench.task.loss import in_batch_loss
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import DataSize, ModelBuilder, used_modalities
from tpme.methods.base import Method, Schedule
from tpme.methods.registry import create

# Threads cost these tiny tensors more than they bring, and far more where cores are shared.
torch.set_num_threads(1)

WIDTH, DEPTH, HEADS, FFN = 16, 2, 2, 32
VOCAB, TOKENS, SIDE, PATCH = 50, 6, 32, 16
DIM, USERS, ITEMS, SLOTS = 8, 7, 12, 6
BOTH: tuple[Modality, ...] = ("text", "image")


def bert_config(dropout: float = 0.0, **changes: Any) -> BertConfig:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.2,  # weights that matter: with 0.02 a tiny encoder hardly tells items apart
    }
    return BertConfig(**(settings | changes))


def vit_config(dropout: float = 0.0, **changes: Any) -> ViTConfig:
    settings = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.2,
    }
    return ViTConfig(**(settings | changes))


def encoder(modality: Modality, *, dropout: float = 0.0, seed: int = 7, **changes: Any) -> BertModel | ViTModel:
    """A seeded BERT or ViT without pooler, in eval mode; its biases are not zero, as after pretraining."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if modality == "text":
            module = BertModel(bert_config(dropout, **changes), add_pooling_layer=False)
        else:
            module = ViTModel(vit_config(dropout, **changes), add_pooling_layer=False)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def views(modalities: Sequence[Modality] = BOTH, *, dropout: float = 0.0) -> dict[Modality, EncoderView]:
    return {modality: EncoderView(encoder(modality, dropout=dropout), modality) for modality in modalities}


@dataclass(frozen=True)
class Manifest:
    items: int


@dataclass(frozen=True)
class Catalogue:
    """What batches and evaluation read of a prepared data set."""

    train_slots: NDArray[np.int32]
    popularity: NDArray[np.float64]
    images: NDArray[np.uint8]
    manifest: Manifest

    def gather_images(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.images[ids]


@dataclass(frozen=True)
class Tokens:
    """A token table: ids (N+1, T), lengths (N+1,)."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]


def catalogue(users: int = USERS, items: int = ITEMS, seed: int = 0) -> Catalogue:
    """Random users with 2 to S items, repeats included, left-padded."""
    rng = np.random.default_rng(seed)
    slots = np.zeros((users, SLOTS), dtype=np.int32)
    for row in slots:
        length = int(rng.integers(2, SLOTS + 1))
        row[-length:] = rng.integers(1, items + 1, length)
    counts = np.bincount(slots[slots > 0], minlength=items + 1).astype(np.float64)
    images = rng.integers(0, 256, (items + 1, 3, SIDE, SIDE), dtype=np.uint8)
    return Catalogue(slots, counts / counts.sum(), images, Manifest(items))


def tokens(items: int = ITEMS, seed: int = 1, length: int = TOKENS) -> Tokens:
    """Titles of 2 to T tokens; row 0, padding, is all zero."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[0], rng.integers(2, TOKENS + 1, items)]).astype(np.int32)
    ids = rng.integers(1, VOCAB, (items + 1, TOKENS)) * (np.arange(TOKENS) < lengths[:, None])
    wide = np.zeros((items + 1, length), dtype=np.int32)
    wide[:, :TOKENS] = ids
    return Tokens(wide, lengths)


def store(data: Catalogue, modalities: Sequence[Modality] = BOTH) -> ItemStore:
    return ItemStore(
        data, tokens=tokens(data.manifest.items) if "text" in modalities else None, images="image" in modalities
    )


def items(modalities: Sequence[Modality] = BOTH, ids: Sequence[int] | None = None) -> Items:
    """The inputs of items ``ids``, by default of the whole catalogue without padding."""
    wanted = np.arange(1, ITEMS + 1) if ids is None else np.array(ids)
    return store(catalogue(), modalities).gather(wanted.astype(np.int64))


def batch(modalities: Sequence[Modality] = BOTH, protocol: str = "suite", users: int = 7) -> Batch:
    data = catalogue(users)
    return build_batch(data.train_slots, log_popularity(data), store(data, modalities), protocol)


def data_size() -> DataSize:
    return DataSize(USERS, ITEMS, SLOTS - 1, catalogue().popularity)


def schedule() -> Schedule:
    return Schedule(epochs=2, steps_per_epoch=3, popularity=catalogue().popularity)


def recommender(
    method: Method,
    modalities: Sequence[Modality] = BOTH,
    *,
    encoder_dropout: float = 0.0,
    dropout: float = 0.0,
    seed: int = 3,
    with_views: bool = True,
) -> Recommender:
    """A recommender that ``method`` has adapted; ``seed`` is of everything but the encoders."""
    torch.manual_seed(seed)
    parts = views(used_modalities(method, modalities), dropout=encoder_dropout)
    training = Training(epochs=2, users_per_batch=3, embedding_dim=DIM, heads=HEADS, dropout=dropout)
    builder = ModelBuilder(method, training, data_size(), {modality: view.shape for modality, view in parts.items()})
    return builder.build(parts if with_views else {})


def build(
    name: str, options: Mapping[str, Any] | None = None, modalities: Sequence[Modality] = BOTH, **settings: Any
) -> tuple[Method, Recommender]:
    method = create(name, options or {}, settings.pop("methods_path", ()))
    return method, recommender(method, modalities, **settings)


def loss_of(model: Recommender, data: Batch) -> Tensor:
    vectors = model.encode_items(data.items)
    users = model.user_vectors(vectors[data.slot[:, :-1]], data.mask)
    return in_batch_loss(users, vectors, data.candidates)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def train(method: Method, model: Recommender, steps: int, modalities: Sequence[Modality] = BOTH) -> list[float]:
    """``steps`` optimiser steps in train mode on one batch; returns the losses."""
    groups = method.param_groups(model, LearningRates(recommender=1e-2, text=1e-2, image=1e-2, method=1e-2))
    optimizer = method.optimizer(groups, fused=False)
    data, losses = batch(used_modalities(method, modalities)), []
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def vectors(model: Recommender, inputs: Items) -> Tensor:
    """Item vectors in eval mode."""
    return model.eval().encode_items(inputs)


def save_old_vit(model: ViTModel, folder: Path) -> None:
    """Save a ViT as transformers 4 did: the same weights under the old names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    save_file(
        {old_vit_name(name): value.contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
    )


_VIT_NAMES = (
    ("layers.", "encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def old_vit_name(name: str) -> str:
    for new, old in _VIT_NAMES:
        name = name.replace(new, old)
    return name
