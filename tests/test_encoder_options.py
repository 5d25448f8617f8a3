"""Encoder options of a matrix, from the file through the plan, the cells and the feature cache to the record."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tpme.bench.contract.small_encoders import small_config
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell, MetaEncoders
from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.run.inputs import feature_job
from tpme.bench.run.plan import plan_matrix
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.features import feature_folder
from tpme.bench.task.items import Reads
from tpme.methods.registry import create

OPTIONS = {"pool": "mean", "dtype": "bf16", "attention": "eager"}


@pytest.fixture(scope="module")
def clip(world: Any, harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with both towers, and a tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    text, vision = (small_config(f"clip-{kind}").to_dict() for kind in ("text", "image"))
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    harness.save_tokenizer(folder, list(Dataset.open(world.data).titles or ()), 50)
    return folder


def encoders(folder: Path, **options: str) -> list[dict[str, Any]]:
    return [{kind: {"source": str(folder), "tower": kind} | options for kind in ("text", "image")}]


@pytest.mark.slow
def test_options_reach_plan_cells_cache_and_record(clip: Path, world: Any, harness: ModuleType, tmp_path: Path) -> None:
    methods = [{"name": "frozen", "cached": [False, True]}]
    matrix = world.matrix(methods, encoders=encoders(clip, **OPTIONS))
    results = world.run(matrix, tmp_path / "runs")
    assert [result.status for result in results] == ["ok", "ok"]
    plan = plan_matrix(matrix, store=world.store, console=harness.quiet())
    for result, planned in zip(results, plan.cells, strict=True):
        assert planned.problem is None
        for name in ("forward_flops", "backward_flops", "weight_bytes", "stored_bytes"):
            assert getattr(planned.work, name) == result.counters[name].value, name
        loaded = (
            result.cache.encoders
            if result.cell.cached
            else {"text": result.text_encoder, "image": result.image_encoder}
        )
        for modality, architecture in (("text", "CLIPTextModel"), ("image", "CLIPVisionModel")):
            facts = loaded[modality]
            assert (facts.architecture, facts.pool, facts.dtype) == (architecture, "mean", "bfloat16")
            assert facts.attention == "eager"
    uncached, cached = (result.epochs[0].valid_recall_10 for result in results)
    assert cached == pytest.approx(uncached, abs=0.1)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_the_planner_builds_what_a_cell_would(clip: Path, modality: Modality) -> None:
    meta = MetaEncoders()
    spec = EncoderSpec(source=str(clip), tower=modality, **OPTIONS)
    view = meta.view(spec, modality)
    assert {(p.device.type, p.dtype) for p in view.module.parameters()} == {("meta", torch.bfloat16)}
    assert view.config._attn_implementation == "eager"
    assert meta.shape(spec, modality) == view.shape
    assert view.shape.pool == "mean"
    plain = meta.shape(EncoderSpec(source=str(clip)), modality)
    assert plain.pool == {"text": "last", "image": "first"}[modality]


def test_options_hold_for_encoders_that_need_no_network() -> None:
    meta = MetaEncoders()
    spec = EncoderSpec(source="bert-base-uncased", **OPTIONS)
    view = meta.view(spec, "text")
    assert next(view.module.parameters()).dtype == torch.bfloat16
    assert (view.shape.pool, view.config._attn_implementation) == ("mean", "eager")
    assert meta.shape(spec, "text").pool == "mean"


def test_the_cost_of_weights_in_half_precision_is_half(clip: Path, world: Any, tmp_path: Path) -> None:
    bytes_of = {}
    for dtype in ("fp32", "bf16"):
        matrix = world.matrix(["frozen"], encoders=encoders(clip, dtype=dtype))
        cell = world.job(matrix, tmp_path).cell
        bytes_of[dtype] = count(MetaCell(cell, DataShape.of(Dataset.open(world.data)))).weight_bytes
    encoder = sum(
        p.numel()
        for m in ("text", "image")
        for p in MetaEncoders().view(EncoderSpec(source=str(clip)), m).module.parameters()
    )
    assert bytes_of["fp32"] - bytes_of["bf16"] == 2 * encoder


def test_every_option_makes_another_cache(clip: Path, world: Any, tmp_path: Path) -> None:
    job = world.job(world.matrix(["frozen"], encoders=encoders(clip)), tmp_path)
    reads = Reads(final=True, pool="last")
    folders = set()
    for options in ({}, {"tower": "text"}, {"dtype": "bf16"}, {"attention": "eager"}):
        spec = EncoderSpec(source=str(clip), **options)
        folders.add(feature_folder(feature_job(job, create("frozen", {}), "text", spec, reads), "data"))
    spec = EncoderSpec(source=str(clip))
    for other in (Reads(final=True, pool="mean"), Reads(final=True, tokens="all"), Reads((1,), pool="last")):
        folders.add(feature_folder(feature_job(job, create("frozen", {}), "text", spec, other), "data"))
    assert len(folders) == 7


def test_half_precision_is_refused_where_a_method_trains_through_the_encoder(
    clip: Path, world: Any, tmp_path: Path
) -> None:
    for dtype in ("bf16", "fp16", "auto"):
        matrix = world.matrix(["frozen", "lora"], encoders=encoders(clip, dtype=dtype))
        with pytest.raises(UserError, match=r"^method 'lora' trains through the .* float32; remove dtype = ") as error:
            world.jobs(matrix, tmp_path)
        assert "\n" not in str(error.value)
    world.jobs(world.matrix(["frozen", "iisan", "id"], encoders=encoders(clip, dtype="bf16")), tmp_path)


def test_an_encoder_that_cannot_be_read_is_refused_before_anything_runs(clip: Path, world: Any, tmp_path: Path) -> None:
    for options, message in (({"tower": "image"}, "its input is image"), ({"pool": "first"}, "cannot be read with")):
        pair = [{"text": {"source": str(clip)} | options, "image": {"source": str(clip)}}]
        with pytest.raises(UserError, match=message) as error:
            world.jobs(world.matrix(["frozen"], encoders=pair), tmp_path)
        assert "\n" not in str(error.value)
        world.jobs(world.matrix(["id"], encoders=pair), tmp_path)  # which reads none
