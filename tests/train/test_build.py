"""The recipe of a model: what is counted on ``meta`` is what a cell trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_rows import method_rows

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.meta import MetaCell
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Training
from tpme.bench.run.cell import CellRun
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.build import ModelBuilder, steps_per_epoch
from tpme.methods.registry import create

OPTIONS = {"autopeft": {"engine": "random"}}
"""Its default needs a package that may be missing."""


def parameters(model: Recommender) -> dict[str, tuple[torch.Size, bool]]:
    """Shape of every parameter, and whether it trains."""
    return {name: (parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()}


def checkpointed(model: Recommender) -> bool:
    layers = [layer for view in model.views.values() for layer in view.layers]
    return bool(layers) and all(isinstance(layer.forward, partial) for layer in layers)


@pytest.mark.parametrize(
    ("method", "cached"),
    method_rows(fast=("autopeft", "bitfit", "dapt", "fedpeptao", "fft", "id", "lora", "popularity", "prompt", "pyra")),
)
def test_the_counters_see_the_model_that_is_trained(world: Any, tmp_path: Path, method: str, cached: bool) -> None:
    # Nothing at its default: a setting that only one of the two reads would make them differ.
    training = {"embedding_dim": 12, "blocks": 1, "heads": 3, "dropout": 0.3, "users_per_batch": 7}
    recomputed = len(create(method, {}).passes()) == 1  # two passes would be mixed up, and are refused
    training |= {"activation_checkpointing": recomputed, "max_steps_per_epoch": 5 if cached else None}
    training["epochs"] = len(create(method, {}).stages())
    matrix = world.matrix([{"name": method, "options": OPTIONS.get(method, {}), "cached": cached}], training=training)
    job = world.job(matrix, tmp_path)
    trainer = CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None).prepare()
    meta = MetaCell(job.cell, DataShape.of(trainer.dataset))
    for stage in trainer.method.stages():  # counted is the last stage
        trainer.state.stage = stage
        trainer.method.begin_stage(trainer.state)
    assert parameters(meta.model) == parameters(trainer.model)
    described = repr(meta.model).replace("torch.meta.", "torch.").replace(" (META -1)", "")
    assert described == repr(trainer.model)  # modules without parameters, such as dropout, too
    assert meta.model.frozen == trainer.model.frozen
    assert meta.model.item_encoder.reads == trainer.model.item_encoder.reads
    assert checkpointed(meta.model) == checkpointed(trainer.model)
    if recomputed:
        assert checkpointed(trainer.model) == (not cached and bool(trainer.model.views))
    steps = meta.schedule.steps_per_epoch
    assert steps == trainer.state.schedule.steps_per_epoch == len(list(trainer.loader.epoch(1)))
    assert meta.schedule.epochs == trainer.state.schedule.epochs
    assert (meta.schedule.popularity == trainer.state.schedule.popularity).all()


def test_the_last_smaller_batch_is_a_step_and_the_limit_cuts() -> None:
    limits = (None, 2, 99)
    assert [steps_per_epoch(10, Training(users_per_batch=4, max_steps_per_epoch=most)) for most in limits] == [3, 2, 3]
    assert steps_per_epoch(8, Training(users_per_batch=4)) == 2


def test_loading_does_not_change_what_adaptation_draws(tiny: Any) -> None:
    """``build`` with a seed: whatever was drawn since the constructor, the adapted parameters are the same."""
    adapted = []
    for drawn in (0, 5):
        views = tiny.views()
        method = create("lora", {})
        torch.manual_seed(1)
        shapes = {modality: view.shape for modality, view in views.items()}
        builder = ModelBuilder(method, Training(embedding_dim=8), tiny.data_size(), shapes)
        torch.rand(drawn)
        adapted.append(builder.build(views, seed=3).state_dict())
    assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in adapted[0])


def test_a_named_group_trains_at_its_own_rate(world: Any, harness: Any, tmp_path: Path) -> None:
    body = """
    groups = ("norms", "rest")

    def adapt(self, model, schedule):
        from tpme.bench.task.recommender import group

        for layer in model.views["text"].layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.requires_grad_(True)
                    group(module, "norms", ["weight"])
                    group(module, "rest", ["bias"])
    """
    harness.write_method(tmp_path / "methods", "grouped", body)
    method = {"name": "grouped", "lr": [{"method": 3e-3, "groups": {"norms": 1e-2}}]}
    job = world.job(world.matrix([method], modalities=["text"]), tmp_path, [tmp_path / "methods"])
    trainer = CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None).prepare()
    rates = {group["name"]: group["lr"] for group in trainer.optimizer().param_groups}
    assert rates == {"recommender": 2e-4, "norms": 1e-2, "rest": 3e-3}
