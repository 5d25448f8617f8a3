"""Cells beside each other: who owns which cores and GPUs, and that Ctrl-C ends them all."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from plain_record import CELL
from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.measure.environment import CELLS_BESIDE, environment
from tpme.bench.record import Cell
from tpme.bench.run import attempt
from tpme.bench.run.engines import local
from tpme.bench.run.engines.local import GPUS, LocalEngine, local_engine
from tpme.bench.run.job import Job
from tpme.bench.run.progress import Screen

CORES = sorted(os.sched_getaffinity(0))
STUB = """
import json, os, sys, time
from pathlib import Path
from plain_record import result
from tpme.bench.record import write_result
from tpme.bench.run.job import Job
job = Job.model_validate_json(Path(sys.argv[1]).read_text())
told = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "TPME_CELLS_BESIDE")]
there = job.folder.parent / f"{job.folder.name}.json"
there.write_text(json.dumps([*told, sorted(os.sched_getaffinity(0)), time.monotonic()]))
until = time.monotonic() + 60
while time.monotonic() < until and len(list(there.parent.glob("*.json"))) < int(os.environ["STUB_WAITS_FOR"]):
    time.sleep(0.01)
if "STUB_HANGS" in os.environ:
    time.sleep(60)
there.write_text(json.dumps([*told, sorted(os.sched_getaffinity(0)), time.monotonic()]))
write_result(result(cell=job.cell, cell_id=job.cell_id), job.file(".json"))
"""
"""Says what it was told; ends when as many cells run beside it, or have run, as it is to wait for."""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stub.py").write_text(STUB)
    command = [sys.executable, str(tmp_path / "stub.py")]
    monkeypatch.setattr(attempt, "command", lambda job_file, *_: [*command, str(job_file)])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv(GPUS, raising=False)
    return tmp_path


def jobs(folder: Path, devices: list[int], device: str = "cpu") -> list[Job]:
    return [
        Job(
            cell=Cell.model_validate(CELL.model_dump() | {"device": device, "training": {"devices": number}}),
            cell_id="0" * 12,
            code_version="v",
            dataset_path=folder,
            store=folder,
            folder=folder / str(place),
            cache_limit_bytes=1,
            time_limit_s=60,
        )
        for place, number in enumerate(devices)
    ]


def run(engine: LocalEngine, attempts: list[Job]) -> list[list[object]]:
    screen = Screen(Console(file=io.StringIO()), len(attempts))
    with (attempts[0].folder.parent / "lock").open("w") as lock:
        ended = {job.folder.name for job, _ in engine.run(attempts, screen, lock.fileno())}
    assert ended == {job.folder.name for job in attempts}
    return [json.loads(job.folder.with_suffix(".json").read_text()) for job in attempts]


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_cells_beside_each_other_share_the_cores(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_WAITS_FOR", "2")  # so both run at one time
    told = run(LocalEngine(jobs=2), jobs(stubs, [1, 1]))
    assert [beside for _, beside, *_ in told] == ["2", "2"]
    mine, other = (set(cores) for *_, cores, _ in told)  # type: ignore[call-overload]
    assert mine.isdisjoint(other)
    assert len(mine) == len(other) == len(CORES) // 2


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_cell_owns_as_many_gpus_as_it_has_devices(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_WAITS_FOR", "1")
    told = run(LocalEngine(gpus=("GPU-a", "GPU-b")), jobs(stubs, [1, 2, 1], "cuda"))
    names = [set(str(gpus).split(",")) for gpus, *_ in told]
    assert names[1] == {"GPU-a", "GPU-b"}
    assert [len(names[0]), len(names[2])] == [1, 1]
    assert [beside for _, beside, *_ in told] == ["2", "1", "2"]


def test_one_cell_at_a_time_owns_the_machine(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_WAITS_FOR", "1")
    told = run(LocalEngine(), jobs(stubs, [1, 1]))
    assert [told[0][0], told[0][1], told[0][2]] == [None, None, CORES]


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_ctrl_c_ends_all_cells(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_WAITS_FOR", "1")
    monkeypatch.setenv("STUB_HANGS", "1")

    def interrupt() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and len(list(stubs.glob("*.json"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(LocalEngine(jobs=2), jobs(stubs, [1, 1, 1]))
    thread.join()
    assert not list(stubs.glob("*/*")), "no record, log or job file is left"
    assert not stubs.joinpath("2.json").exists(), "the third was never started"


def test_the_device_key_says_how_many_cells_ran_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CELLS_BESIDE, raising=False)
    alone = environment("cpu").device_key
    monkeypatch.setenv(CELLS_BESIDE, "2")
    assert environment("cpu").device_key == f"{alone}, 2 cells at a time"


def test_bad_numbers_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"--jobs 1000: every cell needs a core, and there are {len(CORES)}"):
        local_engine("cpu", 1000, None)
    monkeypatch.setattr(local, "visible_gpus", lambda: ("0",))
    with pytest.raises(UserError, match="--jobs: it is for cells on the CPU"):
        local_engine("cuda", 2, None)
    assert len(local_engine("cuda", None, None).places) == 1
