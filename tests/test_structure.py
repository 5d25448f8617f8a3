"""Counters of the structure as trained: the same as at the start, unless training has changed it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from method_rows import method_rows

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.run.cell import CellRun
from tpme.bench.run.counters import exact_counters
from tpme.bench.train.compiling import compile_model
from tpme.bench.train.loop import Trainer
from tpme.methods.registry import create

ROWS = method_rows(fast=("iisan",))
CUT = {"autopeft", "light-peft"}
"""What they search or cut depends on the data; a plan has the configuration given, and cuts every layer alike."""
PRUNED = """
    def stages(self):
        return Stage("dense", 0.5), Stage("pruned", 0.5)

    def adapt(self, model, schedule):
        model.encoders.requires_grad_(True)

    def begin_stage(self, state):
        if state.stage.name == "pruned":
            state.model.encoders.requires_grad_(False)

    def run(self, context):
        self.context = context
        context.train()
        layer = context.state.model.views["text"].layers[0]
        wide, narrow = layer.intermediate.dense, layer.output.dense
        half = wide.out_features // 2
        wide.weight, wide.bias = (torch.nn.Parameter(p.data[:half].clone(), False) for p in (wide.weight, wide.bias))
        narrow.weight = torch.nn.Parameter(narrow.weight.data[:, :half].clone(), False)
        self.kept, self.teacher = wide, torch.ones(3, requires_grad=True) * 2
"""


def trainer_of(world: Any, folder: Path, method: Any, methods_path: Path | None = None, **training: Any) -> Trainer:
    """Of the cell of ``method``, as a cell makes it."""
    job = world.job(world.matrix([method], training=training), folder, [methods_path] if methods_path else ())
    return CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None).prepare()


@pytest.mark.parametrize(("method", "cached"), [row for row in ROWS if row.values[0] not in CUT])
def test_what_keeps_its_structure_keeps_its_counters(world: Any, tmp_path: Path, method: str, cached: bool) -> None:
    recomputed = len(create(method, {}).passes()) == 1  # two passes would be mixed up, and are refused
    training = {"precision": "bf16", "activation_checkpointing": recomputed, "epochs": len(create(method, {}).stages())}
    trainer = trainer_of(world, tmp_path, {"name": method, "cached": cached}, **training)
    data = DataShape.of(trainer.dataset)
    start = exact_counters(MetaCell(trainer.cell, data))
    trainer.run()
    assert exact_counters(MetaCell.trained(trainer, data)) == start


def test_a_structure_is_counted_as_training_has_left_it(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    harness.write_method(tmp_path / "methods", "pruned", PRUNED)
    matrix = world.matrix(["pruned"], modalities=["text"], training={"epochs": 2})
    job = world.job(matrix, tmp_path, [tmp_path / "methods"])
    run = CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None)
    trainer = run.prepare()
    data = DataShape.of(trainer.dataset)
    start = count(MetaCell(trainer.cell, data, methods_path=job.methods_path))
    own = sum(p.numel() for p in (*trainer.model.sequence.parameters(), *trainer.model.item_encoder.parameters()))
    assert start.trainable == own, "of the last stage"
    trainer.run()
    trained = count(MetaCell.trained(trainer, data))
    held = sum(tensor.nbytes for tensor in (*trainer.model.parameters(), *trainer.model.buffers()))
    assert trained.weight_bytes == held < start.weight_bytes
    assert trained.trainable == own
    assert trained.optimizer_bytes == 2 * trained.step.gradient_bytes == 8 * own
    assert trained.step.forward_flops < start.step.forward_flops
    assert trained.step.uncounted == ()


def test_a_record_counts_what_was_trained(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    harness.write_method(tmp_path / "methods", "pruned", PRUNED)
    matrix = world.matrix(["pruned"], modalities=["text"], training={"epochs": 2})
    result = world.tell(matrix, tmp_path, methods_path=[tmp_path / "methods"])
    assert result.status == "ok", result.failure
    assert result.counters["weight_bytes"].value < 4 * result.parameters.total + 4 * 40 * 8
    assert (
        result.counters["trainable_parameters"].value == result.parameters.trainable < result.parameters.trainable_max
    )


def test_nothing_of_the_trained_model_is_copied_or_changed(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    harness.write_method(tmp_path / "methods", "pruned", PRUNED)
    trainer = trainer_of(world, tmp_path, "pruned", tmp_path / "methods", epochs=2)
    trainer.run()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    generator, tensors = torch.get_rng_state(), list(trainer.model.parameters())
    meta = MetaCell.trained(trainer, DataShape.of(trainer.dataset))
    count(meta)
    assert {tensor.device.type for tensor in (*meta.model.parameters(), *meta.model.buffers())} == {"meta"}
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(now is then for now, then in zip(trainer.model.parameters(), tensors, strict=True))
    assert all(parameter.grad is None for parameter in tensors)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module.training for module in trainer.model.modules())
    method: Any = meta.method
    assert method is not trainer.method
    assert method.context is trainer, "what a method has kept of the harness is not copied"
    assert any(module is method.kept for module in meta.model.modules()), "its own references lead into the copy"
    assert method.teacher.device.type == "meta"


def test_a_compiled_model_is_counted_as_a_plain_one(world: Any, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, "lora")
    data = DataShape.of(trainer.dataset)
    assert compile_model(trainer.model)
    assert exact_counters(MetaCell.trained(trainer, data)) == exact_counters(MetaCell(trainer.cell, data))
