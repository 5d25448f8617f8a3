"""``--save-adapters``: what a method has trained, put into a fresh model, gives the recorded ranks again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from method_rows import method_rows
from typer.testing import CliRunner

from tpme.bench.cli import app
from tpme.bench.errors import UserError
from tpme.bench.measure.phases import measuring
from tpme.bench.record import CellResult, read_result, write_result
from tpme.bench.run.cell import CellRun
from tpme.bench.run.restore import restore
from tpme.bench.train.delta import read_delta

ROWS = method_rows(fast=("dapt", "iisan", "lora", "popularity", "pt-peft"))  # one of each kind
# The best epoch is the first or second: learning rates this high make the later ones worse.
WORSENING = {"training": {"epochs": 3}, "lr": {"recommender": 0.3, "text": 0.3, "image": 0.3, "method": 0.3}}

Saved = Callable[..., tuple[Path, CellResult]]


@pytest.fixture
def saved(world: Any, tmp_path: Path) -> Saved:
    """Run one cell in this process, with its adapter: its record, and that as a file."""

    def run(method: Any, methods_path: Path | None = None, **changes: Any) -> tuple[Path, CellResult]:
        job = world.job(
            world.matrix([method], **changes), tmp_path, [methods_path] if methods_path else (), save_adapters=True
        )
        with measuring("cpu") as phases:
            cell_run = CellRun(job, phases, lambda _what, _share: None)
            status = cell_run.run()
        result = cell_run.record(status)
        write_result(result, job.file(".json"))
        return job.file(".json"), result

    return run


def ranks_again(world: Any, record: Path, **settings: Any) -> Any:
    trainer = restore(record, dataset=world.data, store=world.store, **settings)
    trainer.validate()
    return trainer.outcome.test_ranks


def recorded_ranks(record: Path, result: CellResult) -> Any:
    return np.load(record.with_name(result.files["ranks"]))["rank"]


@pytest.mark.parametrize(("method", "cached"), ROWS)
def test_every_methods_delta_gives_the_recorded_ranks(world: Any, saved: Saved, method: str, cached: bool) -> None:
    record, result = saved({"name": method, "cached": cached}, **WORSENING)
    assert result.status == "ok", result.failure
    assert result.files["adapter"] == "attempt-1.adapter.safetensors"
    assert not list(record.parent.glob(".attempt-*")), "nothing else is left"
    assert (ranks_again(world, record) == recorded_ranks(record, result)).all()
    assert result.parameters is not None
    _, state = read_delta(record.with_name(result.files["adapter"]))
    assert sum(value.nbytes for value in state.values()) == result.parameters.stored_bytes


def test_the_state_is_that_of_the_best_epoch_and_no_part_of_training(world: Any, saved: Saved) -> None:
    record, result = saved("bitfit", **WORSENING)
    recalls = [epoch.valid_recall_10 for epoch in result.epochs]
    assert result.best_epoch == 1 + recalls.index(max(recalls))
    assert result.best_epoch < len(recalls), "the model went on from there"
    trainer = restore(record, dataset=world.data, store=world.store)
    assert trainer.validate().recall_10 == max(recalls)
    phases = [(phase.kind, phase.name) for phase in result.phases]
    written = phases.index(("export", f"adapter epoch {result.best_epoch}"))
    assert phases[written - 1] == ("rank", f"epoch {result.best_epoch}")
    assert phases[written + 1] == ("train", f"epoch {result.best_epoch + 1}")


def test_of_several_stages_it_is_the_last_ones(world: Any, harness: ModuleType, tmp_path: Path, saved: Saved) -> None:
    body = """
    def stages(self):
        return Stage("heads", 0.5), Stage("all", 0.5)

    def begin_stage(self, state):
        state.model.encoders.requires_grad_(state.stage.name == "all")
    """
    harness.write_method(tmp_path / "methods", "unfreezing", body)
    record, result = saved("unfreezing", tmp_path / "methods", training={"epochs": 2})
    assert result.best_epoch == 2
    ranks = ranks_again(world, record, methods_path=[tmp_path / "methods"])
    assert (ranks == recorded_ranks(record, result)).all()


def test_a_search_leaves_the_delta_of_the_model_it_has_chosen(
    world: Any, harness: ModuleType, tmp_path: Path, saved: Saved
) -> None:
    body = """
    class Config(MethodConfig):
        width: int = 4

    def adapt(self, model, schedule):
        random = torch.randn(self.config.width)  # frozen, and not stored
        model.views["text"].module.register_buffer("random", random, persistent=False)
        model.item_encoder.register_forward_hook(lambda _m, _a, out: out + self.bias + random.sum())
        self.bias = torch.nn.Parameter(torch.zeros(16))
        model.item_encoder.register_parameter("bias", self.bias)

    def run(self, context):
        forks = [context.fork(Mine(self.Config(width=width)), seed=width) for width in (5, 6)]
        for fork in forks:
            fork.train()
        context.validate()
        context.adopt(forks[0])
    """
    harness.write_method(tmp_path / "methods", "searching", body)
    record, result = saved("searching", tmp_path / "methods")
    assert result.status == "ok", result.failure
    assert not list(record.parent.glob(".attempt-*"))
    facts, state = read_delta(record.with_name(result.files["adapter"]))
    assert (facts.options, facts.seed) == ('{"width":5}', 5)
    assert "item_encoder.bias" in state
    ranks = ranks_again(world, record, methods_path=[tmp_path / "methods"])
    assert (ranks == recorded_ranks(record, result)).all()


def test_a_search_may_end_with_a_registered_method(
    world: Any, harness: ModuleType, tmp_path: Path, saved: Saved
) -> None:
    body = """
    def run(self, context):
        from tpme.methods.registry import create
        context.adopt(context.fork(create("adapter", {"bottleneck": 3}), seed=3))
        context.train()
    """
    harness.write_method(tmp_path / "methods", "choosing", body)
    record, result = saved("choosing", tmp_path / "methods")
    assert result.status == "ok", result.failure
    ranks = ranks_again(world, record, methods_path=[tmp_path / "methods"])
    assert (ranks == recorded_ranks(record, result)).all()


def test_a_cell_that_fails_leaves_none(world: Any, harness: ModuleType, tmp_path: Path, saved: Saved) -> None:
    harness.write_method(tmp_path / "methods", "failing", "def prepare_inference(self, model):\n    1 / 0")
    record, result = saved("failing", tmp_path / "methods")
    assert (result.status, result.best_epoch) == ("error", 1)
    assert "adapter" not in result.files
    assert not list(record.parent.glob("*.safetensors")) + list(record.parent.glob(".attempt-*"))


def test_run_saves_adapters_where_it_is_asked_to(world: Any, tmp_path: Path) -> None:
    matrix, folder = world.write(tmp_path / "m.toml", world.matrix(["id"])), tmp_path / "run"
    command = ["run", str(matrix), "--out", str(folder), "--device", "cpu", "--no-report", "--store", str(world.store)]

    def run(*options: str) -> list[str]:
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, done.output
        return sorted(path.name for path in folder.rglob("attempt-*") if path.suffix in (".json", ".safetensors"))

    assert run() == ["attempt-1.json"]
    assert run("--save-adapters") == ["attempt-1.json", "attempt-2.adapter.safetensors", "attempt-2.json"]
    assert len(run("--save-adapters")) == len(run()) == 3, "it is done"
    [record] = folder.rglob("attempt-2.json")
    assert read_result(record).files["adapter"] == "attempt-2.adapter.safetensors"
    [first] = folder.rglob("attempt-1.json")
    with pytest.raises(UserError, match=r"attempt-1.json: it has no adapter file; run .* with --save-adapters$"):
        restore(first, dataset=world.data)
    record.with_name("attempt-2.adapter.safetensors").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"attempt-2.adapter.safetensors: it is not the file that was recorded"):
        restore(record, dataset=world.data)


def test_tensors_that_share_memory_are_stored_one_by_one(tmp_path: Path, tiny: ModuleType) -> None:
    from tpme.bench.train.delta import DeltaFile

    method, model = tiny.build("frozen")
    table = torch.arange(6.0).reshape(2, 3)
    method.state = lambda _model: {"a": table, "b": table.T, "c": table[1]}
    DeltaFile(tmp_path / "delta").write(method, model, 3)
    facts, state = read_delta(tmp_path / "delta")
    assert (facts.method, facts.seed) == ("FrozenEncoders", 3)
    assert all(torch.equal(state[name], value) for name, value in method.state(model).items())
