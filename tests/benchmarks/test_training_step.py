"""A training step of every method that runs the encoders: distinct items against padded slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from tpme.bench.counting.modes import Tracker
from tpme.bench.record import LearningRates
from tpme.bench.task.batches import Batch, ItemStore, build_batch, log_popularity
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.sequential import SequentialEncoder
from tpme.bench.task.tokens import tokenise
from tpme.bench.task.view import EncoderView
from tpme.bench.train.step import total_loss
from tpme.methods.base import Method, Plan, TaskShape
from tpme.methods.registry import create

USERS, WIDTH, DEPTH, SIDE, PATCH, DIM = 32, 128, 2, 224, 16, 64
ADAPTING = ("fft", "adapter", "lora", "bitfit", "prompt")
PRINTED_S = {"fft": 4.1, "lora": 3.0, "bitfit": 2.7, "adapter": 2.7, "iisan": 1.35}
"""Seconds of the reference at this shape, two cores; none is printed for prompt tuning."""


class Pictures:
    """Scientific with a made-up picture an item, drawn when it is asked for: only its shape matters here."""

    def __init__(self, data: Dataset) -> None:
        self.manifest, self.train_slots, self.popularity = data.manifest, data.train_slots, data.popularity

    def gather_images(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        drawn = [np.random.default_rng(int(item)).integers(0, 256, (3, SIDE, SIDE), np.uint8) for item in ids]
        return np.stack(drawn)


def encoders(depth: int = DEPTH) -> dict[Any, EncoderView]:
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "intermediate_size": 4 * WIDTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    text = BertModel(BertConfig(**shape), add_pooling_layer=False).eval()
    image = ViTModel(ViTConfig(**shape, image_size=SIDE, patch_size=PATCH), add_pooling_layer=False).eval()
    return {"text": EncoderView(text, "text"), "image": EncoderView(image, "image")}


def adapted(name: str, data: Dataset) -> tuple[Method, Recommender]:
    method, views = create(name, {}), encoders()
    torch.manual_seed(1)
    task = TaskShape(DIM, data.manifest.items, {modality: view.shape for modality, view in views.items()})
    sequence = SequentialEncoder(DIM, 10, 2, 2, dropout=0.0)
    model = Recommender(views, method.item_encoder(task), sequence, decoupled=method.decoupled)
    method.adapt(model, Plan(1, 1, data.popularity))
    return method, model.train()


@pytest.fixture(scope="module")
def store(scientific: Dataset, shared: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ItemStore:
    vocabulary = str(shared("pretrained", "bert-base-uncased"))
    tokens = tokenise(scientific, vocabulary, None, 30, tmp_path_factory.mktemp("tokens"))
    return ItemStore(Pictures(scientific), tokens=tokens, images=True)  # type: ignore[arg-type]


def inputs(data: Dataset, store: ItemStore) -> tuple[Batch, Items, Tensor, Tensor]:
    """One batch both ways: the suite's, and all slots with their ids (B, S) and log popularity (B S,)."""
    slots, log_p = data.train_slots[:USERS], log_popularity(data)
    ids = slots.astype(np.int64)
    return (
        build_batch(slots, log_p, store, "suite"),
        store.gather(ids.flatten()),
        torch.from_numpy(ids),
        torch.from_numpy(log_p)[torch.from_numpy(ids).flatten()],
    )


def steps(name: str, data: Dataset, store: ItemStore, looped: ModuleType) -> tuple[Any, Any, Any]:
    """A whole training step of both sides, and what the losses of both are before any."""
    batch, slots, ids, log_p = inputs(data, store)
    sides = []
    for padded in (True, False):
        method, model = adapted(name, data)
        optimizer = method.optimizer(method.param_groups(model, LearningRates()), fused=not padded)

        def forward(method: Method = method, model: Recommender = model, padded: bool = padded) -> Tensor:
            if padded:
                return looped.padded_step(model, slots, ids, log_p)
            return total_loss(method, model, batch)

        def step(forward: Any = forward, optimizer: torch.optim.Optimizer = optimizer) -> float:
            loss = forward()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        sides.append((forward, step, model))
    return sides[0], sides[1], batch


def saved_bytes(forward: Callable[[], Tensor], model: Recommender) -> int:
    """What a forward pass keeps for the backward pass."""
    tracker = Tracker(model.parameters())
    with tracker, tracker.saving():
        loss = forward()
        kept = tracker.saved_bytes()
    del loss
    return kept


@pytest.mark.parametrize("name", ADAPTING)
def test_distinct_items_instead_of_padded_slots(
    name: str,
    scientific: Dataset,
    store: ItemStore,
    looped: ModuleType,
    compare: Any,
    say: Callable[[str], None],
    against_print: Any,
) -> None:
    (slow_forward, slow, slow_model), (fast_forward, fast, fast_model), batch = steps(name, scientific, store, looped)
    memory = saved_bytes(fast_forward, fast_model) / saved_bytes(slow_forward, slow_model)
    say(f"{name}: {len(batch.items)} of {USERS * 11} slots are unique; kept for backward: {memory:.2f} of the padded")
    assert slow() == pytest.approx(fast(), rel=1e-4)
    assert slow() == pytest.approx(fast(), rel=1e-3)  # the updates were equal, too

    found = compare(f"step, {name}", slow, fast, rounds=2)
    if name in PRINTED_S:
        against_print(found.slow_s, PRINTED_S[name])
    assert memory <= 0.5
    assert found.ratio >= 2


def test_iisan_keeps_only_what_it_reads(
    scientific: Dataset, store: ItemStore, looped: ModuleType, compare: Any, against_print: Any
) -> None:
    (_, slow, _), (_, fast, _), _ = steps("iisan", scientific, store, looped)
    assert slow() == pytest.approx(fast(), rel=1e-4)
    found = compare("step, iisan uncached", slow, fast, rounds=2)
    against_print(found.slow_s, PRINTED_S["iisan"])
    assert found.ratio >= 2


@torch.no_grad()
def test_the_encoders_part_of_iisan_does_not_grow_with_depth(benchmark: Any, say: Callable[[str], None]) -> None:
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
    assert peaks[8] <= 1.05 * peaks[2]
