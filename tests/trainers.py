"""Trainers of small cells, in this process; used by tests and by the programs that they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Cell, EncoderSpec, LearningRates, Training
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.items import Reads, States, TokenStates
from tpme.bench.task.placement import ItemShard
from tpme.bench.task.tokens import tokenise
from tpme.bench.train.build import DataSize, ModelBuilder, used_modalities
from tpme.bench.train.kept import Kept
from tpme.bench.train.loop import Trainer
from tpme.bench.train.ranks import Ranks
from tpme.bench.train.sharding import shard
from tpme.methods.base import Method
from tpme.methods.registry import create

TRAINING = {"epochs": 2, "users_per_batch": 20, "embedding_dim": 16, "title_tokens": 8, "max_steps_per_epoch": 2}


def cached_states(read: Reads, items: int, width: int, device: str) -> States:
    """Random hidden states of all items, pooled or of every token, whichever the method reads."""
    if read.tokens != "all":
        return torch.randn(items, read.count, width).half().to(device)
    states = torch.randn(items, read.count, TRAINING["title_tokens"], width).half()
    return TokenStates(states.to(device), torch.ones(states[:, 0, :, 0].shape, dtype=torch.bool, device=device))


def trainer_maker(world: Any, folder: Callable[[], Path], ranks: Ranks | None = None) -> Callable[..., Trainer]:
    """Build the trainer of a method, given as an object or by name; like a cell does, but for the instruments.

    Args:
        world: with the paths ``data``, ``text``, ``image`` and ``store``. folder: a new folder at each call, for what a
            procedure keeps. ranks: that train the cells together.
    """
    dataset = Dataset.open(world.data)
    specs = {"text": EncoderSpec(source=str(world.text)), "image": EncoderSpec(source=str(world.image))}
    tokens = tokenise(dataset, str(world.text), None, 8, world.store)

    def make(
        method: Method | str,
        *,
        modalities: tuple[str, ...] = ("text",),
        seed: int = 1,
        lr: float = 1e-3,
        cached: bool = False,
        device: str = "cpu",
        kept: Kept | None = None,
        phases: PhaseLog | None = None,
        sharded: bool = False,
        **changes: Any,
    ) -> Trainer:
        if isinstance(method, str):
            method = create(method, {})
        protocol = changes.pop("protocol", "suite")
        training = Training(**(TRAINING | changes))
        used = used_modalities(method, modalities)
        torch.manual_seed(seed)
        views = {modality: load_encoder(specs[modality], modality, seed=seed).view for modality in used}
        shapes = {modality: view.shape for modality, view in views.items()}
        model = ModelBuilder(method, training, DataSize.of(dataset), shapes).build({} if cached else views)
        cell = Cell(
            method="toy",
            dataset="world",
            dataset_fingerprint=dataset.manifest.fingerprint,
            modalities=used or ("text",),
            protocol=protocol,
            cached=cached,
            device=device,
            training=training,
            lr=LearningRates(recommender=lr, text=2 * lr, image=3 * lr, method=4 * lr),
            seed=seed,
        )
        store = ItemStore(dataset, tokens=tokens if "text" in used else None, images="image" in used)
        if cached:
            reads, rows = model.item_encoder.reads, dataset.manifest.items + 1
            tables = {m: cached_states(reads[m], rows, shapes[m].width, device) for m in reads}
            if sharded and ranks is not None and ranks.size > 1:
                tables = {m: ItemShard.of(table, ranks, torch.device(device)) for m, table in tables.items()}
            store = ItemStore(dataset, states=tables)
        phases = phases or PhaseLog(device, None, None)
        kept = kept or Kept(folder())
        settings = {"modalities": modalities, "lr": lr, "cached": cached, "device": device, "protocol": protocol}
        torch.manual_seed(seed)
        model.to(device, torch.get_default_dtype())
        if training.shard and ranks is not None and ranks.size > 1:
            shard(model, ranks)
        return Trainer(
            cell,
            model,
            method,
            dataset,
            store,
            phases,
            torch.device(device),
            lambda _what, _share: None,
            kept=kept,
            build=lambda other, own: make(other, seed=own, kept=kept, phases=phases, **settings, **changes),
            ranks=ranks,
        )

    return make
