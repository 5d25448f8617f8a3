"""Matrices on a real Slurm without accounting: nothing is lost and nothing runs twice, whatever ends meanwhile."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from engines.local_slurm import MAX_ARRAY_SIZE, NODES, LocalSlurm
from plain_record import CELL, result
from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, CellResult, cell_id, find_results, read_result
from tpme.bench.run import launch
from tpme.bench.run.cell_states import cell_states, counts
from tpme.bench.run.engines import slurm_jobs, slurm_queue, slurm_watch
from tpme.bench.run.engines.choice import device_of, make_engine
from tpme.bench.run.engines.profile import RunProfile, load_profile
from tpme.bench.run.engines.slurm import SlurmEngine
from tpme.bench.run.engines.slurm_jobs import Submission, no_jobs, read_jobs, write_jobs
from tpme.bench.run.engines.slurm_submit import Submitter
from tpme.bench.run.job import Job
from tpme.bench.run.progress import Screen
from tpme.bench.run.remaining import latest_attempt
from tpme.bench.slurm_commands import SlurmError

pytestmark = pytest.mark.slow

STUB = f"{sys.executable} {Path(__file__).with_name('stub_python.py')}"


class Runs:
    """A run folder whose cells are stubs."""

    def __init__(self, root: Path) -> None:
        self.folder, self.store = root / "run", root / "store"
        (self.store / "records").mkdir(parents=True)
        self.screen = io.StringIO()

    def jobs(self, *options: dict[str, Any], seeds: Sequence[int] = (1,), limit_s: float = 60) -> list[Job]:
        """A job for each of ``options`` and seeds; ``name`` makes cells differ that do the same."""
        cells = [
            Cell.model_validate(CELL.model_dump() | {"options": {"name": place, **one}, "seed": seed})
            for place, one in enumerate(options)
            for seed in seeds
        ]
        return [self.job(cell, limit_s) for cell in cells]

    def job(self, cell: Cell, limit_s: float) -> Job:
        identity = cell_id(cell, "v")
        folder = self.folder / "cells" / f"{cell.options['name']}-{cell.seed}-{identity}"
        record = result(cell=cell, cell_id=identity)
        (self.store / "records" / folder.name).write_text(record.model_dump_json())
        return Job(
            cell=cell,
            cell_id=identity,
            code_version="v",
            dataset_path=self.store,
            store=self.store,
            folder=folder,
            cache_limit_bytes=1,
            time_limit_s=limit_s,
        )

    def launch(self, jobs: Sequence[Job], same_node: bool = False, **profile: Any) -> dict[str, CellResult]:
        """Run as ``tpme run --on slurm`` does; returns the records by the names of their folders."""
        engine = SlurmEngine(RunProfile(on="slurm", container=STUB, **profile), same_node)
        screen = Screen(Console(file=self.screen, width=500), len(jobs))
        engine.check(jobs)
        with launch.locked_run(self.folder, shared=True) as lock, screen:
            names = [job.folder.name for job in jobs]
            (self.folder / "cells.json").write_text(json.dumps({"cells": names}))
            results = launch._run_missing(jobs, [latest_attempt(job) for job in jobs], engine, screen, lock)
        return {folder.name: record for folder, record in results.items()}

    def start(self, jobs: Sequence[Job], **profile: Any) -> multiprocessing.process.BaseProcess:
        """``launch`` in a process of its own."""
        process = multiprocessing.get_context("fork").Process(target=self._launch, args=(jobs, profile))
        process.start()
        return process

    def _launch(self, jobs: Sequence[Job], profile: dict[str, Any]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 0
        try:
            self.launch(jobs, **profile)
        except KeyboardInterrupt:
            code = 130
        except UserError as error:
            (self.store / "error").write_text(str(error))
            code = 2
        (self.store / "screen").write_text(self.screen.getvalue())
        os._exit(code)

    def go(self) -> None:
        """Let the cells end that wait."""
        (self.store / "go").touch()

    def ran(self, what: str) -> Counter[str]:
        """How often each cell has started or ended."""
        path = self.store / "ran"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line.split()[1] for line in lines if line.startswith(f"{what} "))

    def records(self) -> dict[Path, bytes]:
        return {
            path: path.read_bytes() for path in self.folder.glob("cells/*/attempt-*.json") if "job" not in path.name
        }

    def states(self) -> dict[str, int]:
        return {state: number for state, number, _ in counts(cell_states(self.folder)) if number}


@pytest.fixture
def runs(slurm: LocalSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(slurm_watch, "RECORD_PATIENCE_S", 1.0)
    return Runs(tmp_path)


def wait_until(true: Callable[[], object], limit_s: float = 120) -> None:
    until_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.1)


def ended_ok(results: dict[str, CellResult]) -> None:
    assert {record.status for record in results.values()} == {"ok"}, [r.failure for r in results.values()]
    assert {record.attempt for record in results.values()} == {1}


# --- what is refused before anything is queued ----------------------------------------------------------------------


def test_what_slurm_does_not_have_is_refused_in_one_line(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(**profile: Any) -> SlurmEngine:
        return SlurmEngine(RunProfile(on="slurm", **profile))

    with pytest.raises(UserError, match="partition 'nope': Slurm has none of this name; it has main, short"):
        engine(partition="nope")
    with pytest.raises(UserError, match=r"run.cpus = 3: no node of partition 'main' has more than 2"):
        engine(partition="main", cpus=3)
    with pytest.raises(UserError, match=r"run.gpus = 1: no node of the default partition has more than 0"):
        engine(gpus=1)
    with pytest.raises(UserError, match=r"run.extra: 'job-name' is not the profile's to set"):
        engine(extra={"job_name": "mine"})
    jobs = runs.jobs({}, limit_s=3600)
    with pytest.raises(UserError, match="a job asks for 3900 s, and the partition ends jobs after 600 s; lower"):
        runs.launch(jobs, partition="short")
    more = [
        jobs[0].model_copy(
            update={"cell": CELL.model_copy(update={"training": CELL.training.model_copy(update={"devices": 2})})}
        )
    ]
    with pytest.raises(UserError, match=r"training.devices = 2: more than run.cpus = 1 of the profile$"):
        runs.launch(more)
    with pytest.raises(UserError, match=r"run.nodes = 3: the default partition has 2$"):
        engine(nodes=3)
    with pytest.raises(UserError, match=r"training.devices = 1: run.nodes = 2 nodes cannot share them evenly"):
        runs.launch(jobs, nodes=2)
    assert not runs.folder.exists(), "nothing is half written"
    with pytest.raises(UserError, match=r"sbatch: .*[Ii]nvalid feature"):
        runs.launch(jobs, constraint="fast")
    assert not (runs.folder / "slurm").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no 'sinfo' on PATH"):
        engine()


def test_what_is_for_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = RunProfile(on="slurm")
    with pytest.raises(UserError, match="--jobs: it is for cells on this machine; with --on slurm"):
        make_engine(profile, device="cpu", jobs=2)
    with pytest.raises(UserError, match="--log: it is for cells on this machine; with --on slurm"):
        make_engine(profile, device="cpu", live=object())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\[run\] nodes = 2: cells run on local, each on one node; it takes"):
        make_engine(RunProfile(nodes=2), device="cpu")
    monkeypatch.setattr("tpme.bench.run.engines.choice.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--on slurm needs submitit: pip install .*\[slurm\]"):
        make_engine(profile, device="cpu")
    with pytest.raises(UserError, match="--on cloud: choose local, slurm, ray"):
        load_profile(None, "cloud")
    file = tmp_path / "lab.toml"
    file.write_text('[run]\non = "slurm"\npartitions = "main"\n')
    with pytest.raises(UserError, match=r"lab.toml: run.partitions: no such setting; did you mean run.partition\?"):
        load_profile(file, None)
    file.write_text('[run]\non = "slurm"\ngpus = 2\nextra = { exclusive = true, mem = "8G" }\n')
    assert load_profile(file, "local").on == "local"
    assert load_profile(file, None).extra == {"exclusive": True, "mem": "8G"}


def test_the_device_is_what_the_profile_asks_for() -> None:
    assert device_of(RunProfile(on="slurm"), "auto") == "cpu"
    assert (
        device_of(RunProfile(on="slurm", gpus=2), "auto") == device_of(RunProfile(on="ray", gpus=1), "cuda") == "cuda"
    )
    with pytest.raises(UserError, match="--device cuda: the profile asks for gpus = 0, so cells run on cpu"):
        device_of(RunProfile(on="slurm"), "cuda")
    with pytest.raises(UserError, match="--device tpu: choose cpu, cuda or auto"):
        device_of(RunProfile(on="slurm"), "tpu")


# --- cells -----------------------------------------------------------------------------------------------------------


def test_cells_end_as_they_would_here(runs: Runs) -> None:
    jobs = runs.jobs({}, {"does": "fail"}, {"does": "killed"}, {"does": "wait"}, limit_s=3)
    results = list(runs.launch(jobs, cpus=2).values())
    assert [record.status for record in results] == ["ok", "error", "killed", "timeout"]
    assert results[1].failure is not None
    assert "no such thing (log: attempt-1.log)" in results[1].failure.message
    assert "time limit of 3 s" in str(results[3].failure)
    assert not (runs.folder / "slurm").exists(), "nothing of Slurm is left"
    lines = (runs.store / "ran").read_text().splitlines()
    assert {line.split()[3] for line in lines if line.startswith("start")} == {"2"}, "threads are the cores of a task"
    assert {line.split()[2] for line in lines if line.startswith("start")} <= set(NODES)
    before = runs.records()
    runs.go()
    assert list(runs.launch([jobs[0], jobs[3]]).values()) == [results[0], results[3]], "finished ones stay as they are"
    assert runs.records() == before
    assert runs.states() == {"finished": 2}


@pytest.mark.slow
def test_a_hundred_cells_while_launcher_node_and_controller_are_killed(runs: Runs, slurm: LocalSlurm) -> None:
    jobs = runs.jobs(*[{"s": 0.5}] * 110)
    assert len(jobs) > 2 * MAX_ARRAY_SIZE
    launcher = runs.start(jobs)
    wait_until(lambda: len(runs.records()) >= 8)
    launcher.kill()
    launcher.join()
    early = runs.records()
    given = read_jobs(runs.folder)
    assert given is not None
    assert [len(submission.tasks) for submission in given.submissions] == [40, 40, 30]
    launcher = runs.start(jobs)
    wait_until(lambda: len(runs.records()) >= len(early) + 8)
    slurm.command("scontrol", "update", "nodename=one", "state=down", "reason=test")
    wait_until(lambda: len(runs.records()) >= len(early) + 16)
    slurm.stop_controller()
    slurm.start_controller()
    slurm.command("scontrol", "update", "nodename=one", "state=resume")
    launcher.join(400)
    assert launcher.exitcode == 0
    ended_ok({path.parent.name: read_result(path) for path in find_results([runs.folder])})
    assert len(runs.records()) == len(jobs)
    assert {path: runs.records()[path] for path in early} == early
    assert set(runs.ran("end").values()) == {1}, "no cell that ended ran again"
    assert len(runs.ran("end")) == len(jobs)
    assert "cells were given to Slurm before; attached" in (runs.store / "screen").read_text()
    assert not (runs.folder / "slurm").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_jobs_running_and_the_same_command_attaches(runs: Runs) -> None:
    jobs = runs.jobs({"does": "wait"}, {"does": "wait"}, {"does": "wait"}, {"does": "wait"}, {"does": "wait"})
    launcher = runs.start(jobs)
    wait_until(lambda: len(runs.ran("start")) == 4)
    assert runs.states() == {"running": 4, "waiting": 1}
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGINT)
    launcher.join(60)
    assert launcher.exitcode == 130
    said = (runs.store / "screen").read_text()
    assert f"5 cells go on in Slurm: the same command attaches again, 'tpme status {runs.folder}' shows them" in said
    assert runs.states() == {"running": 4, "waiting": 1}
    with pytest.raises(UserError, match="it has jobs in Slurm"):
        launch.locked_run(runs.folder).__enter__()
    runs.go()
    ended_ok(runs.launch(jobs))
    assert set(runs.ran("start").values()) == {1}, "nothing was submitted twice"
    assert runs.states() == {"finished": 5}


@pytest.mark.slow
def test_a_launcher_killed_while_it_submits_submits_nothing_twice(runs: Runs, slurm: LocalSlurm) -> None:
    """Between sbatch and its own note of the job's number."""
    jobs = runs.jobs({"does": "wait"}, {"does": "wait"})
    launcher = runs.start(jobs)
    wait_until(lambda: len(runs.ran("start")) == 2)
    launcher.kill()
    launcher.join()
    file = read_jobs(runs.folder)
    assert file is not None
    [submission] = file.submissions
    write_jobs(runs.folder, file.model_copy(update={"submissions": (submission.model_copy(update={"job": None}),)}))
    runs.go()
    first = time.monotonic()
    ended_ok(runs.launch(jobs))
    assert set(runs.ran("end").values()) == {1}, f"after {time.monotonic() - first:g} s"


@pytest.mark.slow
def test_cancelled_by_tpme_and_by_somebody(runs: Runs, slurm: LocalSlurm, harness: ModuleType) -> None:
    jobs = runs.jobs({"does": "wait"}, {"does": "wait"}, {"does": "wait"})
    launcher = runs.start(jobs)
    wait_until(lambda: len(runs.ran("start")) == 3)
    done = harness.tpme_here("cancel", str(runs.folder))
    assert (done.returncode, done.stdout) == (0, "3 jobs cancelled; 'tpme run' resumes.\n")
    launcher.join(60)
    assert launcher.exitcode == 2
    assert "cancelled by 'tpme cancel'; 3 cells are not finished" in (runs.store / "error").read_text()
    assert not runs.records()
    assert runs.states() == {"not started": 3}
    launcher = runs.start(jobs)
    wait_until(lambda: set(runs.ran("start").values()) == {2})
    file = read_jobs(runs.folder)
    assert file is not None
    [submission] = file.submissions
    slurm.command("scancel", submission.ids[1])
    wait_until(lambda: len(runs.records()) == 1)
    runs.go()
    launcher.join(60)
    assert launcher.exitcode == 0
    [record] = [read_result(path) for path in runs.records() if read_result(path).status != "ok"]
    assert record.cell == jobs[1].cell
    assert record.failure is not None
    assert f"its Slurm job {submission.ids[1]} ended as CANCELLED" in record.failure.message
    assert "log.err" in record.failure.message
    assert runs.states() == {"finished": 2, "failed": 1}
    results = runs.launch(jobs)
    assert [results[job.folder.name].attempt for job in jobs] == [1, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["requeue", "preemption"])
def test_a_requeued_cell_goes_on_with_its_finished_parts(runs: Runs, slurm: LocalSlurm, how: str) -> None:
    """Of several seeds in one task those that ended are left alone."""
    jobs = runs.jobs({"does": "resume", "at": 2}, seeds=(1, 2, 3))
    launcher = runs.start(jobs, same_node=True)
    wait_until(lambda: len(runs.records()) == 1 and len(runs.ran("start")) == 2)
    file = read_jobs(runs.folder)
    assert file is not None
    job = file.submissions[0].ids[0]
    if how == "requeue":
        slurm.command("scontrol", "requeue", job)
    else:
        slurm.command("scancel", "--signal=USR2", job)
    launcher.join(120)
    assert launcher.exitcode == 0
    ended_ok({path.parent.name: read_result(path) for path in find_results([runs.folder])})
    assert [runs.ran("start")[job.folder.name] for job in jobs] == [1, 2, 1]
    assert set(runs.ran("end").values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"requeue": False, "no_requeue": True}])
def test_the_cells_of_a_failed_node_run_again(runs: Runs, slurm: LocalSlurm, extra: dict[str, bool]) -> None:
    """Also where Slurm does not queue their jobs again."""
    jobs = runs.jobs(*[{"does": "wait"}] * 4)
    launcher = runs.start(jobs, extra=extra)
    wait_until(lambda: len(runs.ran("start")) == 4)
    slurm.command("scontrol", "update", "nodename=one", "state=down", "reason=test")
    try:
        wait_until(lambda: runs.states() == {"running": 2, "waiting": 2})
    finally:
        slurm.command("scontrol", "update", "nodename=one", "state=resume")
    wait_until(lambda: runs.ran("start").total() == 6)
    runs.go()
    launcher.join(120)
    assert launcher.exitcode == 0
    ended_ok({path.parent.name: read_result(path) for path in find_results([runs.folder])})
    assert sorted(runs.ran("start").values()) == [1, 1, 2, 2]
    assert set(runs.ran("end").values()) == {1}


def test_what_slurm_has_forgotten_is_submitted_again_and_at_last_fails(runs: Runs) -> None:
    [job] = jobs = runs.jobs({})
    file = no_jobs(runs.folder)
    attempt = slurm_watch.Attempt.of(job)
    gone = [Submission(name=file.new_name(), job=str(900 + number), tasks=((attempt,),)) for number in range(4)]
    write_jobs(runs.folder, file.model_copy(update={"submissions": tuple(gone)}))
    [record] = runs.launch(jobs).values()
    assert record.status == "killed"
    assert record.failure is not None
    assert "its Slurm job 903 ended and Slurm has forgotten how, after 4 tries, and left no" in record.failure.message
    write_jobs(runs.folder, file.model_copy(update={"submissions": (gone[0],)}))
    [record] = runs.launch(jobs).values()
    assert (record.status, record.attempt) == ("ok", 2)


@pytest.mark.slow
def test_where_slurm_takes_no_more_jobs_the_others_wait(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under MaxSubmitJobs, which needs accounting; it counts every task."""
    submit, sizes = Submitter.submit, []

    def limited(self: Submitter, run: Path, name: str, work: object, tasks: list[object], *rest: Any) -> str:
        left = slurm_jobs.active(slurm_queue.queue("tpme-").values())
        if len(left) + len(tasks) > 3:
            raise SlurmError("sbatch: Job violates accounting/QOS policy")
        sizes.append(len(tasks))
        return submit(self, run, name, work, tasks, *rest)

    monkeypatch.setattr(Submitter, "submit", limited)
    ended_ok(runs.launch(runs.jobs(*[{"s": 5}] * 6)))  # longer than two attempts to submit more
    assert sum(sizes) == 6
    assert set(runs.ran("start").values()) == {1}
    assert (
        "Slurm takes no more now (sbatch: Job violates accounting/QOS policy); 3 cells wait" in runs.screen.getvalue()
    )


@pytest.mark.slow
def test_what_sbatch_submitted_though_it_failed_does_not_run_twice(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, first = Submitter.submit, []

    def timed_out(self: Submitter, *arguments: Any) -> str:
        number = submit(self, *arguments)
        if not first:
            first.append(number)
            raise SlurmError("sbatch: Socket timed out on send/recv operation")
        return number

    monkeypatch.setattr(Submitter, "submit", timed_out)
    ended_ok(runs.launch(runs.jobs({"s": 2}, {"s": 2})))
    assert set(runs.ran("end").values()) == {1}


@pytest.mark.slow
def test_the_seeds_of_a_cell_are_one_task(runs: Runs) -> None:
    jobs = runs.jobs({}, {}, seeds=(1, 2, 3))
    ended_ok(runs.launch(jobs, same_node=True))
    nodes: dict[str, set[str]] = {}
    for line in (runs.store / "ran").read_text().splitlines():
        if line.startswith("start"):
            nodes.setdefault(line.split()[1].partition("-")[0], set()).add(line.split()[2])
    assert [len(of) for of in nodes.values()] == [1, 1]


# --- real cells -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_matrix_of_real_cells(runs: Runs, world: Any, harness: ModuleType, tmp_path: Path) -> None:
    matrix = world.matrix([{"name": "iisan", "cached": [False, True]}], seeds=[1, 2])
    file, store = world.write(tmp_path / "matrix.toml", matrix), tmp_path / "own"
    profile = tmp_path / "lab.toml"
    profile.write_text('[run]\non = "slurm"\npartition = "main"\n')
    command = ["run", str(file), "--profile", str(profile), "--store", str(store), "--out", str(runs.folder)]
    done = harness.tpme_here(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (runs.folder / "report" / "report.md").is_file()
    results = [read_result(path) for path in find_results([runs.folder])]
    assert Counter(record.cell.label for record in results) == {"iisan": 2, "iisan (cached)": 2}
    for record in results:
        assert record.environment is not None
        assert record.environment.node in NODES
        assert record.environment.cpu_threads == 1
    built = [record.cache.built_by_attempt for record in results if record.cache is not None]
    assert built == [False, False], "jobs of their own build the caches, once"
    before = runs.records()
    assert harness.tpme_here(*command, "--no-report").returncode == 0
    assert runs.records() == before


@pytest.mark.slow
def test_two_nodes_train_one_cell(runs: Runs, world: Any, harness: ModuleType, tmp_path: Path) -> None:
    training = {"devices": 2, "users_per_batch": 20}
    file = world.write(tmp_path / "matrix.toml", world.matrix(["bitfit"], training=training))
    profile = tmp_path / "lab.toml"
    profile.write_text('[run]\non = "slurm"\nnodes = 2\n')
    command = ["run", str(file), "--profile", str(profile), "--store", str(world.store), "--out", str(runs.folder)]
    # Both nodes are this machine; its name need not lead to an address that others can reach.
    done = harness.tpme_here(*command, "--no-report", env={"GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = find_results([runs.folder])
    record = read_result(path)
    assert (record.status, len(record.ranks)) == ("ok", 2)
    assert record.environment is not None
    assert "2 ranks of 1 thread, 2 nodes" in record.environment.device_key
    assert {rank.rank: rank.node for rank in record.ranks} == {0: "one", 1: "two"}
    assert [path.name for path in path.parent.iterdir() if path.name.startswith(".")] == []
