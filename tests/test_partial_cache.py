"""Rows that train one encoder and read the other: exactly the frozen one is cached, in a cache that rows share."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness import write_method

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult
from tpme.bench.task.dataset import Dataset
from tpme.bench.train.graphs import unsupported_reason

pytestmark = pytest.mark.slow

TRAINS_TEXT = """
    def frozen_encoders(self, modalities):
        return tuple(modality for modality in modalities if modality == "image")

    def adapt(self, model, schedule):
        model.views["text"].layers[-1].requires_grad_(True)
"""


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_method(folder, "trains_text", TRAINS_TEXT)
    return folder


@pytest.fixture(scope="module")
def twins(world: Any, methods: Path, tmp_path_factory: pytest.TempPathFactory) -> list[CellResult]:
    """The row on both encoders, its cached twin, and ``frozen`` cached before it, which builds both caches."""
    rows = [{"name": "frozen", "cached": True}, {"name": "trains_text", "cached": [False, True]}]
    matrix = world.matrix(rows, training={"epochs": 2, "max_steps_per_epoch": None})
    results = world.run(matrix, tmp_path_factory.mktemp("twins"), methods_path=[methods])
    assert [result.status for result in results] == ["ok"] * 3, [result.failure for result in results]
    return results


def test_the_cached_twin_trains_as_the_uncached_one(twins: list[CellResult]) -> None:
    _, plain, cached = twins
    losses = [epoch.loss for epoch in plain.epochs]
    assert losses[1] < losses[0]
    assert [epoch.loss for epoch in cached.epochs] == pytest.approx(losses, rel=2e-3)
    assert plain.parameters.by_group["text"] > 0
    assert cached.parameters.by_group == plain.parameters.by_group


def test_only_the_encoder_that_trains_is_loaded(twins: list[CellResult]) -> None:
    _, plain, cached = twins
    assert (cached.text_encoder, cached.image_encoder) == (plain.text_encoder, None)
    assert cached.cache.encoders == {"image": plain.image_encoder}
    assert plain.parameters.total - cached.parameters.total == plain.image_encoder.parameters
    loads = [phase.name for phase in cached.phases if phase.kind == "load"]
    assert loads == ["libraries", "data", "cache", "encoders"]
    assert plain.cache is None


def test_the_cache_of_one_encoder_is_shared_with_rows_that_cache_both(twins: list[CellResult]) -> None:
    first, _, cached = twins
    assert set(first.cache.parts) == {"text", "image"}
    assert not cached.cache.built_by_attempt
    assert cached.cache.bytes == first.cache.parts["image"].bytes == cached.counters["cache_bytes"].value
    assert not [phase for phase in cached.phases if phase.kind == "cache"]


def test_its_counters_are_those_of_a_step_with_one_encoder(world: Any, methods: Path, tmp_path: Path) -> None:
    matrix = world.matrix([{"name": "trains_text", "cached": [False, True]}])
    data = DataShape.of(Dataset.open(world.data))
    plain, cached = (
        MetaCell(job.cell, data, methods_path=[methods]) for job in world.jobs(matrix, tmp_path, [methods])
    )
    assert (set(plain.model.views), set(cached.model.views)) == ({"text", "image"}, {"text"})
    assert (plain.cache_bytes, list(cached.cache_bytes)) == ({}, ["image"])
    assert "encoders run" in (unsupported_reason(cached.method, cached.model) or "")  # no CUDA graphs either
    assert plain.model.frozen == cached.model.frozen == {"image"}
    items = cached.batch.items
    assert (items.image, list(items.states)) == (None, ["image"])
    assert items.tokens.shape == plain.batch.items.tokens.shape


def test_checkpointing_has_an_effect_where_one_encoder_trains(world: Any, methods: Path, tmp_path: Path) -> None:
    """The flag says "nothing to checkpoint" only where no gradient flows through any encoder."""
    training = {"activation_checkpointing": True}
    for method, flagged in (("trains_text", False), ("frozen", True)):
        matrix = world.matrix([{"name": method, "cached": True}], training=training)
        result = world.tell(matrix, tmp_path / method, methods_path=[methods])
        assert result.status == "ok", result.failure
        assert ("no-checkpointing" in {flag.code for flag in result.flags}) == flagged


def test_a_method_that_leaves_no_encoder_frozen_has_nothing_to_cache(world: Any, methods: Path, tmp_path: Path) -> None:
    matrix = world.matrix([{"name": "trains_text", "cached": True}], modalities=["text"])
    with pytest.raises(UserError, match="'trains_text' cannot be cached"):
        world.jobs(matrix, tmp_path, [methods])


EVERY_TOKEN = """
    decoupled = True

    def item_encoder(self, task):
        from tpme.bench.task.items import Reads
        from tpme.bench.task.recommender import ItemEncoder

        class Attended(ItemEncoder):
            def __init__(self):
                super().__init__({m: Reads((1,), final=True, tokens="all") for m in task.encoders})
                width = sum(shape.width for shape in task.encoders.values())
                self.project = torch.nn.Linear(width, task.dim)

            def forward(self, states, ids):
                means = []
                for modality in self.reads:
                    kept, mask = states[modality].states.mean(dim=1), states[modality].mask[:, :, None]
                    means.append((kept * mask).sum(dim=1) / mask.sum(dim=1))
                return self.project(torch.cat(means, dim=1))

        return Attended()
"""


def test_states_of_every_token_are_cached_with_their_masks(world: Any, tmp_path: Path) -> None:
    write_method(tmp_path / "methods", "every_token", EVERY_TOKEN)
    matrix = world.matrix([{"name": "every_token", "cached": [False, True]}], training={"max_steps_per_epoch": None})
    plain, cached = world.run(matrix, tmp_path / "run", methods_path=[tmp_path / "methods"])
    assert (plain.status, cached.status) == ("ok", "ok"), (plain.failure, cached.failure)
    assert cached.epochs[0].loss == pytest.approx(plain.epochs[0].loss, rel=2e-3)
    dataset = Dataset.open(world.data)
    data = DataShape.of(dataset)
    meta = MetaCell(cached.cell, data, methods_path=[tmp_path / "methods"])
    # Two levels in half precision and a mask of one byte a token: 8 of a title, 4 patches and a class token.
    width = cached.cache.encoders["text"].width
    token = (dataset.manifest.items + 1) * (2 * width * 2 + 1)
    assert meta.cache_bytes == {"text": 8 * token, "image": 5 * token}
    assert {m: part.bytes for m, part in cached.cache.parts.items()} == meta.cache_bytes


def test_a_cache_above_the_limit_is_refused_before_anything_runs(
    world: Any, harness: ModuleType, tmp_path: Path
) -> None:
    """By ``tpme run`` and ``tpme plan`` in the same words, with the bytes that the builder would write."""
    write_method(tmp_path / "methods", "every_token", EVERY_TOKEN)
    items = Dataset.open(world.data).manifest.items
    size = (items + 1) * 5 * (2 * 16 * 2 + 1)  # the images: two levels and a mask, 5 tokens
    matrix = world.matrix([{"name": "every_token", "cached": True}], modalities=["image"], cache_limit_bytes=size - 1)
    path = world.write(tmp_path / "matrix.toml", matrix)
    folders = ("--methods-path", str(tmp_path / "methods"), "--store", str(world.store))
    run = harness.tpme("run", str(path), "--out", str(tmp_path / "run"), *folders)
    plan = harness.tpme("plan", str(path), *folders)
    assert (run.returncode, plan.returncode) == (2, 2)
    assert run.stderr.splitlines() == plan.stderr.splitlines()
    [line] = run.stderr.splitlines()
    assert f"the feature cache of the image encoder needs {size:,} bytes" in line
    assert f"more than the limit (cache_limit_bytes), {size - 1:,}" in line
    assert not (tmp_path / "run").exists()
    [allowed] = world.jobs(
        matrix.model_copy(update={"cache_limit_bytes": size}), tmp_path / "run", [tmp_path / "methods"]
    )
    assert allowed.cache_limit_bytes == size
