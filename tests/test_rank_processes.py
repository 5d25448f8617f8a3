"""The processes of one cell on several devices: started, watched and ended together; the first failure is recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from plain_record import CELL

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, CellResult, cell_id, read_result
from tpme.bench.run import attempt, process
from tpme.bench.run.attempt import run_job
from tpme.bench.run.job import Job
from tpme.bench.run.rank_failures import blamed, claim, failed_elsewhere, leave_note
from tpme.bench.run.rank_processes import RanksEnding

pytestmark = pytest.mark.slow

CORES = sorted(os.sched_getaffinity(0))
STUB = """
import json, os, signal, sys, time
from pathlib import Path
from plain_record import result
from tpme.bench.lifetimes import die_with_launcher
from tpme.bench.record import Failure, write_result
from tpme.bench.run.job import Job
from tpme.bench.run.rank_failures import AFTER_ANOTHER, claim

die_with_launcher()
job = Job.model_validate_json(Path(sys.argv[1]).read_text())
rank = int(os.environ["RANK"])
plan_of_all = json.loads(os.environ["STUB"])
plan = plan_of_all.get(str(rank), "train")
names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TPME_LISTENER", "OMP_NUM_THREADS")
told = {name: os.environ.get(name) for name in names}
told |= {"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0)), "port": int(os.environ["MASTER_PORT"])}
(job.folder / f"told-{rank}.new").write_text(json.dumps(told))
(job.folder / f"told-{rank}.new").rename(job.folder / f"told-{rank}")

def fail(message, status="error"):
    if (path := claim(job, rank)) is not None:
        failure = Failure(phase="train epoch 1", message=message)
        write_result(result(cell=job.cell, cell_id=job.cell_id, status=status, failure=failure), path)
    os._exit(AFTER_ANOTHER if path is None else 1)

def lost():  # what a collective does when another rank is gone
    for path in job.folder.glob("told-*"):
        try:
            state = Path(f"/proc/{json.loads(path.read_text())['pid']}/stat").read_text().split()[2]
        except OSError:
            return True
        if state == "Z":
            return True
    return False

while len(list(job.folder.glob("told-*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
print("rank", rank, "of", os.environ["WORLD_SIZE"], file=sys.stderr, flush=True)
if plan == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "raises":
    fail("ValueError: no such thing")
if plan == "out of memory":
    fail("OutOfMemoryError: Tried to allocate 2.00 GiB", "oom")
if plan == "diverged":
    fail("the loss is not finite", "diverged")
if plan == "aborts":
    os.abort()
if plan == "exits":
    sys.exit("the last words")
if plan in ("hangs", "ends when asked"):
    late = lambda *_: fail("took too long", "timeout")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if plan == "hangs" else late)
    (job.folder / f"waits-{rank}").touch()
    time.sleep(600)
if plan == "train":
    until = time.monotonic() + (600 if plan_of_all else 0)
    while time.monotonic() < until:
        if lost():
            fail("RuntimeError: Connection closed by peer")
        time.sleep(0.01)
if rank == 0:
    print('{"what": "train", "share": 1}', flush=True)
    write_result(result(cell=job.cell, cell_id=job.cell_id), job.file(".json"))
"""
"""A rank: what STUB says of it, by number; any other trains until a rank is gone, and then fails because of it."""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(attempt, "command", lambda job_file, *_: [sys.executable, str(script), str(job_file)])
    monkeypatch.setattr(process, "GRACE_S", 2.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("STUB", "{}")
    return tmp_path


def job_of(folder: Path, devices: int = 2, **changes: Any) -> Job:
    cell = Cell.model_validate(CELL.model_dump() | {"training": {"devices": devices}})
    return Job(
        cell=cell,
        cell_id=cell_id(cell, "v"),
        code_version="v",
        dataset_path=folder,
        store=folder,
        folder=folder / "cell",
        cache_limit_bytes=1,
        **({"time_limit_s": 100.0} | changes),
    )


def told(job: Job) -> list[dict[str, Any]]:
    return [json.loads((job.folder / f"told-{rank}").read_text()) for rank in range(job.cell.training.devices)]


def assert_nothing_is_left(job: Job) -> None:
    pids = [one["pid"] for one in told(job)]
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert not [path.name for path in job.folder.iterdir() if path.name.startswith(".") or "job" in path.name]


def run(stub: Path, monkeypatch: pytest.MonkeyPatch, *plans: str, **changes: Any) -> tuple[Job, CellResult]:
    """Run one attempt whose ranks follow these plans."""
    monkeypatch.setenv("STUB", json.dumps({str(rank): plan for rank, plan in enumerate(plans)}))
    job = job_of(stub, max(2, len(plans)), **changes)
    job.folder.mkdir()
    result = run_job(job)
    assert result == read_result(job.file(".json"))
    assert_nothing_is_left(job)
    return job, result


# --- how they start -------------------------------------------------------------------------------------------------


def test_ranks_start_as_torchrun_starts_processes(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, float]] = []
    job = job_of(stub)
    job.folder.mkdir()
    variables = {"OMP_NUM_THREADS": "4"}
    assert run_job(job, show=lambda what, share: shown.append((what, share)), variables=variables).status == "ok"
    first, second = told(job)
    assert (first["OMP_NUM_THREADS"], second["OMP_NUM_THREADS"]) == ("2", "2")
    assert [one["LOCAL_RANK"] for one in (first, second)] == ["0", "1"]
    assert {one["WORLD_SIZE"] for one in (first, second)} == {"2"}
    assert first["port"] == second["port"] > 0
    assert (first["TPME_LISTENER"] is None, second["TPME_LISTENER"]) == (False, None)
    assert ("train", 1.0) in shown
    half = len(CORES) // 2
    assert [first["cores"], second["cores"]] == [CORES[:half] or CORES, CORES[half : 2 * half] or CORES]
    assert sorted(os.sched_getaffinity(0)) == CORES
    assert [job.log(rank).read_text() for rank in (0, 1)] == ["rank 0 of 2\n", "rank 1 of 2\n"]
    assert job.log(1).name == "attempt-1.rank-1.log"
    assert_nothing_is_left(job)


def test_one_device_starts_one_process_that_is_told_nothing(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "run_ranks", None)
    script = "import os, sys; sys.exit(f\"{os.environ.get('RANK')} {os.environ.get('MASTER_PORT')}\")"
    monkeypatch.setattr(attempt, "command", lambda *_: [sys.executable, "-c", script])
    result = run_job(job_of(stub, 1))
    assert result.failure is not None
    assert result.failure.message == "its process ended with code 1: None None (log: attempt-1.log)"


# --- a rank that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed(stub: Path, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """The others fail in a collective before or after the launcher notices; the record blames neither them nor it."""
    job, result = run(stub, monkeypatch, *("killed" if rank == lost else "train" for rank in (0, 1)))
    assert result.status == "killed"
    assert result.failure is not None
    assert result.failure.message == (
        f"rank {lost} of 2 was ended by SIGKILL; the kernel does this when host memory runs out "
        f"(log: {job.log(lost).name})"
    )


@pytest.mark.parametrize(
    ("plan", "status", "message"),
    [
        ("raises", "error", "rank 1 of 2: ValueError: no such thing (log: attempt-1.rank-1.log)"),
        ("out of memory", "oom", "rank 1 of 2: OutOfMemoryError: Tried to allocate 2.00 GiB (log: "),
        ("diverged", "diverged", "the loss is not finite"),
        ("exits", "error", "rank 1 of 2 ended with code 1: the last words (log: attempt-1.rank-1.log)"),
        ("aborts", "killed", "rank 1 of 2 was ended by SIGABRT (log: "),
    ],
)
def test_the_error_of_a_rank_is_the_failure_and_not_what_follows_on_the_others(
    stub: Path, monkeypatch: pytest.MonkeyPatch, plan: str, status: str, message: str
) -> None:
    _, result = run(stub, monkeypatch, "train", plan)
    assert result.status == status
    assert result.failure is not None
    assert result.failure.message.startswith(message)


def test_ranks_that_are_blocked_in_a_collective_are_ended(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL blocks: no signal that can be handled reaches them."""
    started = time.monotonic()
    _, result = run(stub, monkeypatch, "hangs", "raises", "hangs")
    assert result.failure is not None
    assert result.failure.message.startswith("rank 1 of 3: ValueError: no such thing")
    assert time.monotonic() - started < 60


def test_a_rank_that_ends_without_a_word_is_named_with_its_last_line(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = run(stub, monkeypatch, "hangs", "exits")
    assert result.failure is not None
    assert result.failure.message == "rank 1 of 2 ended with code 1: the last words (log: attempt-1.rank-1.log)"


@pytest.mark.parametrize("plans", [("hangs", "hangs"), ("ends when asked", "hangs"), ("train", "ends when asked")])
def test_a_rank_that_hangs_is_ended_at_the_time_limit(
    stub: Path, monkeypatch: pytest.MonkeyPatch, plans: tuple[str, ...]
) -> None:
    waiting, clock = sum(plan != "train" for plan in plans), time.monotonic
    # The clock of the limit jumps once the ranks wait, however long that takes.
    late = 0.0

    def now() -> float:
        nonlocal late
        if not late and len(list((stub / "cell").glob("waits-*"))) == waiting:
            late = 1000.0
        return clock() + late

    monkeypatch.setattr("tpme.bench.run.rank_processes.time.monotonic", now)
    _, result = run(stub, monkeypatch, *plans, time_limit_s=900.0)
    assert result.status == "timeout"
    assert result.failure is not None
    said = "took longer than its time limit of 900 s; raise time_limit_s or --time-limit"
    assert result.failure.message in (said, "took too long")


def test_nccl_aborts_a_rank_that_has_lost_another(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job.folder.mkdir()
    ending = RanksEnding({0: -signal.SIGABRT, 1: 1}, timed_out=False, last="")
    assert blamed(job, ending) == (0, -signal.SIGABRT)
    on_gpus = job.model_copy(update={"cell": job.cell.model_copy(update={"device": "cuda"})})
    assert blamed(on_gpus, ending) == (1, 1)
    claim(on_gpus, 1)
    assert blamed(on_gpus, ending) == (1, 1)
    assert claim(on_gpus, 0) is None


# --- signals --------------------------------------------------------------------------------------------------------

LAUNCHER = """
import sys
from pathlib import Path
from tpme.bench.run import attempt, process
from tpme.bench.run.job import Job
process.GRACE_S = 2.0
attempt.command = lambda job_file, *_: [sys.executable, {script!r}, str(job_file)]
try:
    attempt.run_job(Job.model_validate_json({job!r}))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_their_launcher(stub: Path, sign: signal.Signals) -> None:
    job = job_of(stub)
    job.folder.mkdir()
    code = LAUNCHER.format(script=str(stub / "stub.py"), job=job.model_dump_json())
    environment = os.environ | {"STUB": '{"1": "hangs"}'}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        until = time.monotonic() + 60
        while time.monotonic() < until and not all((job.folder / f"told-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.05)
        ranks = [psutil.Process(one["pid"]) for one in told(job)]
        launcher.send_signal(sign)
        said, _ = launcher.communicate(timeout=60)
    assert psutil.wait_procs(ranks, timeout=30)[1] == []
    assert said == ("interrupted\n" if sign == signal.SIGINT else "")
    assert not job.file(".json").exists()
    if sign != signal.SIGKILL:
        assert [path.name for path in job.folder.iterdir() if "attempt" in path.name] == []


# --- several nodes --------------------------------------------------------------------------------------------------


NODE = """
import sys
from pathlib import Path
from tpme.bench.run import attempt, process
from tpme.bench.run.job import Job
process.GRACE_S = 2.0
attempt.command = lambda job_file, *_: [sys.executable, {script!r}, str(job_file)]
result = attempt.run_on_nodes(Job.model_validate_json(Path({job!r}).read_bytes()), {number}, 2, "7-0")
assert (result is None) == ({number} == 1)
print(result.failure.message if result and result.failure else "", end="")
"""


def run_nodes(stub: Path, job: Job, plan: dict[str, str]) -> str:
    """Run the ranks of a cell of four devices on two nodes of this machine; returns the failure in the record."""
    job.folder.mkdir()
    (job.folder / f".attempt-{job.attempt}.meeting-6-0").write_text('["nowhere", 1]')  # of an earlier try
    path = stub / "job.json"
    path.write_text(job.model_dump_json())
    codes = [NODE.format(script=str(stub / "stub.py"), job=str(path), number=number) for number in (1, 0)]
    environment = os.environ | {"STUB": json.dumps(plan)}
    nodes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for code in codes
    ]
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    return said[1]


def test_a_node_waits_for_the_first_one_no_longer_than_it_must(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(stub, 4)
    monkeypatch.setattr(attempt, "MEETING_S", 0.0)
    with pytest.raises(UserError, match="meeting-7-0: node 0 did not write it within 0 s; do all nodes see"):
        attempt.run_on_nodes(job, 1, 2, "7-0")


def test_two_nodes_train_one_cell(stub: Path) -> None:
    job = job_of(stub, 4)
    assert run_nodes(stub, job, {}) == ""
    assert read_result(job.file(".json")).status == "ok"
    assert [one["LOCAL_RANK"] for one in told(job)] == ["0", "1", "0", "1"]
    assert {one["WORLD_SIZE"] for one in told(job)} == {"4"}
    assert_nothing_is_left(job)


@pytest.mark.parametrize(("lost", "others"), [("3", "hangs"), ("3", "train"), ("0", "hangs")])
def test_a_lost_rank_is_named_on_whichever_node(stub: Path, lost: str, others: str) -> None:
    job = job_of(stub, 4)
    said = run_nodes(stub, job, dict.fromkeys("0123", others) | {lost: "killed"})
    result = read_result(job.file(".json"))
    assert (result.status, result.failure is None) == ("killed", False)
    assert f"rank {lost} of 4 was ended by SIGKILL" in said
    assert f"(log: {job.log(int(lost)).name})" in said
    assert_nothing_is_left(job)


def test_the_first_node_tells_the_others_of_a_lost_rank_before_it_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs may hang in a collective, and would end with the record alone."""
    job, told = job_of(tmp_path, 4), []

    def others_have_ended(job: Job) -> list[Path]:
        told.append(failed_elsewhere(job))
        return [tmp_path] * 2

    monkeypatch.setattr(attempt, "_run_ranks", lambda *_: RanksEnding({0: -signal.SIGKILL, 1: None}, False, ""))
    monkeypatch.setattr(attempt, "notes", others_have_ended)
    job.folder.mkdir()
    result = attempt.run_on_nodes(job, 0, 2, "7-0")
    assert told == [True]
    assert result is not None
    assert result.failure is not None
    assert result.failure.message.startswith("rank 0 of 4 was ended by SIGKILL")
    assert [path.name for path in job.folder.iterdir()] == ["attempt-1.json"]
    leave_note(job, RanksEnding({2: None, 3: None}, False, ""))
    assert [path.name for path in job.folder.iterdir()] == ["attempt-1.json"], "nobody reads a note that comes later"


def test_a_node_hears_of_a_failure_of_the_first_one(stub: Path) -> None:
    job = job_of(stub, 4)
    said = run_nodes(stub, job, dict.fromkeys("123", "hangs") | {"0": "raises"})
    assert said == "rank 0 of 4: ValueError: no such thing (log: attempt-1.log)"
    assert_nothing_is_left(job)
