"""IISAN on cached states at full width (7 states x 768 x 2 encoders), on batches of Scientific's real interactions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tpme.bench.record import LearningRates
from tpme.bench.task.batches import ItemStore, TrainBatches, log_popularity
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.sequential import SequentialEncoder
from tpme.bench.train.step import total_loss
from tpme.methods.base import TaskShape
from tpme.methods.registry import create

USERS, STEPS, WIDTH, LEVELS, DIM, SEED = 64, 6, 768, 7, 64, 12345
EPOCH_STEPS, SAMPLES = 189, 200
PRINTED_STEP_S, PRINTED_FILE_S = 0.358, 0.200 / 610
"""The reference, two cores: a step, and in it loading of about 610 small files."""


class Side:
    """A model and its optimiser; the fused one is the suite's."""

    def __init__(self, data: Dataset, *, fused: bool) -> None:
        self.method = create("iisan", {})
        torch.manual_seed(1)
        shape = EncoderShape(WIDTH, 12)
        task = TaskShape(DIM, data.manifest.items, {"text": shape, "image": shape})
        sequence = SequentialEncoder(DIM, 10, 2, 2, dropout=0.0)
        self.model = Recommender({}, self.method.item_encoder(task), sequence, decoupled=True).train()
        groups = self.method.param_groups(self.model, LearningRates())
        self.optimizer = self.method.optimizer(groups, fused=fused)

    def update(self, loss: torch.Tensor) -> float:
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def nearest_format(looped: ModuleType, folder: Path, nearest_to_print: Any) -> str:
    """The file format whose time a file is nearest to the printed one."""
    reads = {}
    for number, (kind, (save, load)) in enumerate(looped.FORMATS.items()):
        paths = [folder / f"sample-{number}-{item}" for item in range(SAMPLES)]
        for path in paths:
            save(path, torch.rand(looped.STATES, WIDTH))
        reads[kind] = lambda load=load, paths=paths: [load(path) for path in paths]
    chosen: str = nearest_to_print(f"{SAMPLES} files", reads, SAMPLES * PRINTED_FILE_S)
    return chosen


def test_an_epoch_on_cached_states(
    scientific: Dataset,
    looped: ModuleType,
    compare: Any,
    say: Callable[[str], None],
    against_print: Any,
    nearest_to_print: Any,
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = scientific.manifest.items + 1, LEVELS, WIDTH
    states: dict[Any, torch.Tensor] = {}
    for modality in ("text", "image"):
        states[modality] = torch.empty(shape, dtype=torch.float16).normal_(generator=generator)
        states[modality][0] = 0
    log_p = log_popularity(scientific)
    batches = TrainBatches(
        scientific,
        ItemStore(scientific, states=states),
        users_per_batch=USERS,
        protocol="suite",
        seed=SEED,
        max_steps=STEPS,
        device=torch.device("cpu"),
    )
    order = np.random.default_rng([SEED, 1]).permutation(len(scientific.train_slots))  # the epoch's, as TrainBatches
    slots = scientific.train_slots[order[: STEPS * USERS]].astype(np.int64)
    kind = nearest_format(looped, tmp_path, nearest_to_print)
    files = looped.StateFiles(tmp_path, states, kind)
    files.write(np.unique(slots[slots > 0]))
    ours, theirs = Side(scientific, fused=True), Side(scientific, fused=False)
    loading = {"ours": 0.0, "files": 0.0}

    def per_file() -> list[float]:
        losses, loading["files"] = [], 0.0
        for start in range(0, len(slots), USERS):
            ids = torch.from_numpy(slots[start : start + USERS])
            began = time.perf_counter()
            read = files.read(ids)
            loading["files"] += time.perf_counter() - began
            slot_log_p = torch.from_numpy(log_p)[ids.flatten()]
            losses.append(theirs.update(looped.cached_loss(theirs.model, read, ids, slot_log_p)))
        return losses

    def cached() -> list[float]:
        losses, loading["ours"] = [], 0.0
        epoch = batches.epoch(1)
        while True:
            began = time.perf_counter()
            batch = next(epoch, None)
            loading["ours"] += time.perf_counter() - began
            if batch is None:
                return losses
            losses.append(ours.update(total_loss(ours.method, ours.model, batch)))

    assert cached() == pytest.approx(per_file(), rel=2e-3)  # updates included; the files hold the same rounded states
    found = compare(f"{STEPS} steps, IISAN cached", per_file, cached, rounds=3)
    against_print(found.slow_s / STEPS, PRINTED_STEP_S)
    say(
        f"a step: per file {found.slow_s / STEPS * 1e3:.0f} ms ({loading['files'] / STEPS * 1e3:.0f} loading), "
        f"cached {found.fast_s / STEPS * 1e3:.0f} ms "
        f"({loading['ours'] / found.fast_s:.1%} loading); an epoch of {EPOCH_STEPS} steps "
        f"{found.fast_s / STEPS * EPOCH_STEPS:.1f} s"
    )
    assert found.ratio >= 4
    assert loading["ours"] < 0.1 * found.fast_s
