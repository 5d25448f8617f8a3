"""Cells on a real Ray cluster of two nodes on this machine, each with a store of its own: no files are shared."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from plain_record import CELL
from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, CellResult, read_result
from tpme.bench.run.engines.profile import RunProfile
from tpme.bench.run.job import Job
from tpme.bench.run.progress import Screen
from tpme.bench.run.version import code_version

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
MEMORY = 100 * 2**20
TESTS = Path(__file__).parents[1]
STUB = """
import json, os, sys, time
from pathlib import Path
from plain_record import result
from tpme.bench.measure.environment import environment
from tpme.bench.record import write_result
from tpme.bench.run.job import Job
job = Job.model_validate_json(Path(sys.argv[1]).read_text())
names = ("OMP_NUM_THREADS", "TPME_NODE", "TPME_CELLS_BESIDE", "TPME_STORE", "CUDA_VISIBLE_DEVICES")
told = {name: os.environ.get(name) for name in names} | {"data": str(job.dataset_path), "pid": os.getpid()}
log = Path(os.environ["STUB_LOG"])
with log.open("a") as ran:
    ran.write(json.dumps({"seed": job.cell.seed, **told}) + "\\n")
job.file(".ranks.npz").write_bytes(b"r" * 100_000)
until = time.monotonic() + 60
while time.monotonic() < until and (log.parent / "hold").exists():
    time.sleep(0.02)
time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
write_result(result(cell=job.cell, cell_id=job.cell_id, code_version=job.code_version, environment=environment('cpu')), job.file(".json"))
"""
"""Says what it was told and writes its record, once the file ``hold`` is gone."""


@dataclass
class Two:
    """A cluster of two nodes: the head has one core, ``second`` one and a GPU by name."""

    cluster: Any
    second: Any
    folder: Path

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def engine(self, **settings: Any) -> Any:
        from tpme.bench.run.engines.ray import RayEngine

        same_node = settings.pop("same_node", False)
        return RayEngine(RunProfile(on="ray", address=self.address, **settings), same_node=same_node)

    def ran(self) -> list[dict[str, Any]]:
        """What cells said that started, in their order."""
        log = self.folder / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def add(self, name: str, **has: Any) -> Any:
        environment = {
            "TPME_STORE": str(self.folder / name),
            "PYTHONPATH": str(TESTS),
            "STUB_LOG": str(self.folder / "log"),
        }
        return self.cluster.add_node(node_name=name, env_vars=environment, object_store_memory=MEMORY, **has)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    from ray.cluster_utils import Cluster

    made = Two(Cluster(), None, tmp_path / "nodes")
    made.folder.mkdir()
    try:
        made.add("one", num_cpus=1, include_dashboard=False)
        made.second = made.add("two", num_cpus=1, num_gpus=1)
        yield made
    finally:
        ray.shutdown()
        made.cluster.shutdown()


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cells of the engine are ``STUB``; gives a folder for the run."""
    from tpme.bench.run.engines import ray as engine

    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    command = [sys.executable, str(stub)]

    def run_stub(order: Any) -> Iterator[Any]:
        from tpme.bench.run import attempt
        from tpme.bench.run.engines.ray_node import run_cell

        attempt.command = lambda job_file, *_: [*command, str(job_file)]
        yield from run_cell(order)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(engine, "run_cell", run_stub)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    return tmp_path


def jobs(folder: Path, seeds: Sequence[int], **changes: Any) -> list[Job]:
    file = find_spec("tpme.methods.fft")
    assert file is not None
    assert file.origin is not None
    version = code_version(Path(file.origin))
    cells = [Cell.model_validate(CELL.model_dump() | {"method": "fft", "seed": seed} | changes) for seed in seeds]
    from tpme.bench.record import cell_id

    return [
        Job(
            cell=cell,
            cell_id=cell_id(cell, version),
            code_version=version,
            dataset_path=folder / "data",
            store=folder,
            folder=folder / "run" / "cells" / f"cell-{cell.seed}",
            cache_limit_bytes=1,
            time_limit_s=60,
        )
        for cell in cells
    ]


def run(engine: Any, attempts: Sequence[Job], said: io.StringIO | None = None) -> dict[int, CellResult]:
    screen = Screen(Console(file=said or io.StringIO(), width=200), len(attempts))
    found = {job.cell.seed: result for job, result in engine.run(attempts, screen, -1)}
    for job in attempts:
        assert read_result(job.file(".json")) == found[job.cell.seed]
    return found


def test_cells_run_on_nodes_that_share_no_files(two: Two, stubs: Path) -> None:
    results = run(two.engine(), attempts := jobs(stubs, [1, 2, 3, 4]))
    assert {result.status for result in results.values()} == {"ok"}
    print(two.ran())
    print(results[1].environment)


def test_real(two: Two, world: Any, harness: ModuleType, tmp_path: Path) -> None:
    matrix = world.matrix([{"name": "iisan", "cached": [False, True]}, "id"], seeds=[1, 2])
    file = world.write(tmp_path / "matrix.toml", matrix)
    done = harness.tpme("run", str(file), "--on", "ray", "--out", str(tmp_path / "run"), "--store", str(tmp_path / "store"), env={"RAY_ADDRESS": two.address})
    print(done.stdout, done.stderr)
    subprocess.run(["find", str(two.folder), str(tmp_path / "run"), str(tmp_path / "store")])
    assert done.returncode == 0
