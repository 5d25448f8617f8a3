"""A training step of every method that runs the encoders: distinct items against padded slots.

IISAN also keeps nothing of its encoders but the states that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from tpme.bench.counting.modes import Tracker
from tpme.bench.record import LearningRates, Protocol, Training
from tpme.bench.task.batches import Batch, ItemStore, build_batch, log_popularity
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.tokens import tokenise
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import DataSize, ModelBuilder
from tpme.bench.train.step import total_loss
from tpme.methods.base import Method
from tpme.methods.registry import create

USERS, WIDTH, DEPTH, SIDE, PATCH, DIM = 32, 128, 2, 224, 16, 64
ADAPTING = ("fft", "adapter", "lora", "bitfit", "prompt")
MOST = {"suite": 0.35, "paper": 0.95}
"""Largest share of the plain way's time."""
PRINTED_S = {"fft": 4.1, "lora": 3.0, "bitfit": 2.7, "adapter": 2.7, "iisan": 1.35}
"""Seconds of the reference at this shape, two cores; none is printed for prompt tuning."""


class Pictures:
    """Scientific with a made-up picture an item, drawn when it is asked for: only its shape matters here."""

    def __init__(self, data: Dataset) -> None:
        self.manifest, self.train_slots, self.popularity = data.manifest, data.train_slots, data.popularity

    def gather_images(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        drawn = [np.random.default_rng(int(item)).integers(0, 256, (3, SIDE, SIDE), np.uint8) for item in ids]
        return np.stack(drawn)


def encoders(depth: int = DEPTH, attention: str | None = None) -> dict[Any, EncoderView]:
    """Text and image encoder; their attention is the suite's choice unless one is named."""
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "intermediate_size": 4 * WIDTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    text = BertModel(BertConfig(**shape), add_pooling_layer=False).eval()
    image = ViTModel(ViTConfig(**shape, image_size=SIDE, patch_size=PATCH), add_pooling_layer=False).eval()
    return {m: EncoderView(module, m, attention=attention) for m, module in (("text", text), ("image", image))}


def adapted(name: str, data: Dataset, device: torch.device, attention: str | None) -> tuple[Method, Recommender]:
    method, views = create(name, {}), encoders(attention=attention)
    torch.manual_seed(1)
    shapes = {modality: view.shape for modality, view in views.items()}
    training = Training(embedding_dim=DIM, dropout=0.0, epochs=1)
    return method, ModelBuilder(method, training, DataSize.of(data), shapes).build(views).train().to(device)


@pytest.fixture(scope="module")
def store(scientific: Dataset, shared: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ItemStore:
    vocabulary = str(shared("pretrained", "bert-base-uncased"))
    tokens = tokenise(scientific, vocabulary, None, 30, tmp_path_factory.mktemp("tokens"))
    return ItemStore(Pictures(scientific), tokens=tokens, images=True)  # type: ignore[arg-type]


def inputs(
    data: Dataset, store: ItemStore, device: torch.device, protocol: Protocol
) -> tuple[Batch, Items, Tensor, Tensor]:
    """One batch both ways: the suite's, and all slots with their ids (B, S) and log popularity (B S,)."""
    slots, log_p = data.train_slots[:USERS], log_popularity(data)
    ids = slots.astype(np.int64)
    return (
        build_batch(slots, log_p, store, protocol).to(device),
        store.gather(ids.flatten()).to(device),
        torch.from_numpy(ids).to(device),
        torch.from_numpy(log_p)[torch.from_numpy(ids).flatten()].to(device),
    )


@dataclass(frozen=True)
class Side:
    """One way to do a training step: its loss with the graph, the model, and its optimiser."""

    forward: Callable[[], Tensor]
    model: Recommender
    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        """A whole training step; returns the loss before it."""
        loss = self.forward()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def peak_bytes(self) -> int:
        """Most memory alive at one time in forward and backward pass, the model's own apart."""
        with Tracker([*self.model.parameters(), *self.model.buffers()]) as tracker:
            held = tracker.peak_bytes
            with tracker.saving():
                loss = self.forward()
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()
        return tracker.peak_bytes - held


def sides(
    name: str, data: Dataset, store: ItemStore, looped: ModuleType, device: torch.device, protocol: Protocol
) -> tuple[Side, Side]:
    """The plain way (padded slots, eager attention) and the suite's, on equal weights."""
    batch, slots, ids, log_p = inputs(data, store, device, protocol)
    found = []
    for padded in (True, False):
        method, model = adapted(name, data, device, "eager" if padded else None)
        optimizer = method.optimizer(method.param_groups(model, LearningRates()), fused=not padded)
        forward = (
            partial(looped.padded_step, model, slots, ids, log_p)
            if padded
            else partial(total_loss, method, model, batch)
        )
        found.append(Side(forward, model, optimizer))
    return found[0], found[1]


@pytest.mark.parametrize("protocol", ["suite", "paper"])
@pytest.mark.parametrize("name", [*ADAPTING, "iisan"])
def test_a_step_against_the_plain_way(
    name: str,
    protocol: Protocol,
    scientific: Dataset,
    store: ItemStore,
    looped: ModuleType,
    compare: Any,
    printed: Any,
    note: Callable[..., None],
    say: Callable[[str], None],
    device: torch.device,
) -> None:
    """``suite`` encodes fewer items; ``paper`` does equal work, and must not be slower."""
    slow, fast = sides(name, scientific, store, looped, device, protocol)
    memory = fast.peak_bytes() / slow.peak_bytes()
    say(f"{name}, {protocol}: peak activation memory {memory:.2f} of the plain way's")
    assert slow.step() == pytest.approx(fast.step(), rel=1e-4)
    assert slow.step() == pytest.approx(fast.step(), rel=1e-3)  # the updates were equal, too

    known = printed(PRINTED_S[name]) if name in PRINTED_S else None
    share = MOST[protocol]
    compare(f"training step, {name}, {protocol}", slow.step, fast.step, 1 / share, printed=known)
    if protocol == "suite":
        note(f"peak activation memory, {name}", "0.4x", f"{memory:.2f}x")
        assert memory <= 0.4


@torch.no_grad()
def test_the_encoders_part_of_iisan_does_not_grow_with_depth(
    benchmark: Any, say: Callable[[str], None], note: Callable[..., None]
) -> None:
    peaks = {}
    image = torch.zeros(8, 3, SIDE, SIDE, dtype=torch.uint8)
    for depth in (2, 8):
        view = encoders(depth)["image"]
        tracker = Tracker((*view.module.parameters(), image))
        with tracker:
            before = tracker.peak_bytes
            view.encode(Reads(tuple(range(0, depth + 1, 2))), image=image)
        peaks[depth] = tracker.peak_bytes - before
    benchmark.pedantic(view.encode, (Reads((0, 8)),), {"image": image}, rounds=1)
    say(f"peak of encoding 8 images: {peaks[2] / 2**20:.1f} MiB with 2 layers, {peaks[8] / 2**20:.1f} MiB with 8")
    note("IISAN, peak of its encoders, 8 layers against 2", "1x", f"{peaks[8] / peaks[2]:.2f}x")
    assert peaks[8] <= 1.05 * peaks[2]
