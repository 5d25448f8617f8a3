"""Real cells on two ranks of this machine, through ``tpme run``: what they record, and how they fail."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.bench.quantities import memory_reading
from tpme.bench.record import CellResult, read_result
from tpme.bench.run.engines.local import LocalEngine

CORES = len(os.sched_getaffinity(0))
TWO = {"training": {"devices": 2, "epochs": 3, "dropout": 0.0}}
pytestmark = pytest.mark.skipif(CORES < 2, reason="two ranks need two cores")
slow = pytest.mark.slow
BREAKS = """
steps = []
def before_step(self, state):
    import os, signal, time
    plan, rank = os.environ["BREAKS"].split(" on ")
    self.steps.append(state.step)
    if plan == "repeats" and self.steps.count(state.step) > 1 and os.environ.get("RANK") == rank:
        raise ValueError("no such thing")
    if state.step != 1 or os.environ.get("RANK") != rank:
        return
    if plan == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "raises":
        raise ValueError("no such thing")
    if plan == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if plan == "diverges":
        state.model.sequential.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    if plan == "hangs":
        open(os.environ["BREAKS_HERE"], "w").close()
        time.sleep(600)
"""
"""Goes wrong on one rank in the second step, or in the first one that is repeated after training."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def ranks_of(result: CellResult, folder: Path) -> Any:
    name = result.files["ranks"]
    [path] = folder.rglob(f"*{result.cell_id}/{name}")
    with np.load(path) as arrays:
        return arrays["rank"]


@slow
def test_a_cell_on_two_devices_ends_as_on_one_and_records_both(world: Any, tmp_path: Path) -> None:
    rows = ["fft", {"name": "iisan", "cached": True}, "popularity"]
    pairs = [
        world.run(world.matrix(rows, training=TWO["training"] | {"devices": devices}), tmp_path / str(devices))
        for devices in (1, 2)
    ]
    for one, two in zip(*pairs, strict=True):
        assert (one.status, two.status) == ("ok", "ok"), two.failure
        assert (one.ranks, len(two.ranks)) == ((), 2)
        assert [rank.rank for rank in two.ranks] == [0, 1]
        assert two.environment.devices == (one.environment.device_name,) * 2
        assert two.environment.device_key == f"{one.environment.device_name}, 2 ranks of 1 thread"
        phases = [[(one.kind, one.name) for one in result.phases if one.kind != "cache"] for result in (one, two)]
        assert phases[0] == phases[1]
        same = ranks_of(one, tmp_path / "1") == ranks_of(two, tmp_path / "2")
        assert same.mean() > 0.95  # the order of sums differs, and with it nearly equal scores
        for a, b in zip(one.epochs, two.epochs, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=1e-3)
        held = [memory_reading("memory_bytes", rank.training_memory, "cpu").value for rank in two.ranks]
        if one.epochs:
            assert two.epoch_time_s.value == pytest.approx(np.median([epoch.train_s for epoch in two.epochs[1:]]))
            assert memory_reading("memory_bytes", two.training_memory, "cpu").value == max(held)
        else:
            assert held == [None, None]
        assert two.ranks[0].training_energy_j.value is None  # no instrument for it on a CPU
    folder = tmp_path / "2" / "cells"
    left = {path.name for path in folder.rglob("*")} - {path.name for path in folder.iterdir()}
    assert left == {f"attempt-1.{end}" for end in ("json", "log", "rank-1.log", "ranks.npz", "samples.npz")}


def broken(
    world: Any, harness: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, plan: str, **settings: Any
) -> CellResult:
    harness.write_method(folder / "methods", "breaks", BREAKS)
    monkeypatch.setenv("BREAKS", plan)
    matrix = world.matrix(["breaks"], training=TWO["training"] | {"max_steps_per_epoch": 3})
    [result] = world.run(matrix, folder / "run", methods_path=[folder / "methods"], **settings)
    [cell] = (folder / "run" / "cells").iterdir()
    assert read_result(cell / "attempt-1.json") == result
    assert not [path for path in cell.iterdir() if path.name.startswith(".")]
    return result


@slow
@pytest.mark.parametrize(
    ("plan", "status", "message"),
    [
        ("killed on 1", "killed", "rank 1 of 2 was ended by SIGKILL; the kernel does this when host memory runs out "
         "(log: attempt-1.rank-1.log)"),
        ("killed on 0", "killed", "rank 0 of 2 was ended by SIGKILL; the kernel does this when host memory runs out "
         "(log: attempt-1.log)"),
        ("raises on 1", "error", "rank 1 of 2: ValueError: no such thing (log: attempt-1.rank-1.log)"),
        ("raises on 0", "error", "rank 0 of 2: ValueError: no such thing (log: attempt-1.log)"),
        ("out of memory on 1", "oom", "rank 1 of 2: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
         "(log: attempt-1.rank-1.log)"),
    ],
)  # fmt: skip
def test_a_rank_that_fails_is_named(
    world: Any,
    harness: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan: str,
    status: str,
    message: str,
) -> None:
    result = broken(world, harness, tmp_path, monkeypatch, plan)
    assert (result.status, result.failure.message if result.failure else "") == (status, message)
    if status != "killed":  # it has said what it knew
        assert result.failure is not None
        assert (result.failure.phase, result.failure.step) == ("train epoch 1", 2)
        assert [rank.rank for rank in result.ranks] == [int(plan[-1])]
        assert result.environment is not None
        assert len(result.environment.devices) == 2
    if status == "oom":
        assert result.failure is not None
        assert result.failure.bytes_requested == 2 << 30


@slow
def test_a_rank_that_fails_after_training_leaves_none_waiting(
    world: Any, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = broken(world, harness, tmp_path, monkeypatch, "repeats on 1")
    assert (result.status, result.failure is None) == ("error", False)
    assert result.failure is not None
    assert result.failure.message.startswith("rank 1 of 2: ValueError: no such thing")
    assert result.failure.phase == "count parts of a step"


@slow
def test_a_rank_that_hangs_is_in_its_log(
    world: Any, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, clock = tmp_path / "hangs", time.monotonic
    monkeypatch.setenv("BREAKS_HERE", str(hangs))
    # The clock of the limit jumps once it hangs, however long that takes.
    later = "tpme.bench.run.rank_processes.time.monotonic"
    monkeypatch.setattr(later, lambda: clock() + (1000.0 if hangs.exists() else 0.0))
    result = broken(world, harness, tmp_path, monkeypatch, "hangs on 1", time_limit_s=900.0)
    assert result.status == "timeout"
    [log] = (tmp_path / "run").rglob("attempt-1.rank-1.log")
    assert "in before_step" in log.read_text()


def test_more_ranks_than_cores_are_refused_before_anything_runs(world: Any, tmp_path: Path) -> None:
    matrix = world.matrix(["popularity"], training={"devices": CORES + 1, "users_per_batch": CORES + 1})
    with pytest.raises(UserError, match=rf"training.devices = {CORES + 1}: {CORES} cores are there for a cell"):
        world.run(matrix, tmp_path, dry_run=True)
    assert list(tmp_path.iterdir()) == []


def test_cells_beside_each_other_have_fewer_cores_for_ranks(world: Any, tmp_path: Path) -> None:
    matrix = world.matrix(["popularity"], training={"devices": 2})
    LocalEngine(jobs=1).check(world.jobs(matrix, tmp_path))
    with pytest.raises(UserError, match="lower training"):
        LocalEngine(jobs=CORES).check(world.jobs(matrix, tmp_path))


def test_more_ranks_than_gpus_are_refused(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpme.bench.run.engines.local.visible_gpus", lambda: ("0",))
    [job] = world.jobs(world.matrix(["popularity"], training={"devices": 2}), tmp_path)
    job = job.model_copy(update={"cell": job.cell.model_copy(update={"device": "cuda"})})
    with pytest.raises(UserError, match=r"training.devices = 2: 1 GPUs are visible"):
        LocalEngine().check([job])
