"""Real cells, a real cache build, a compilation and ``tpme ab``: the same faults where torch runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from fake_nvml import FakeGpu, fake_nvml
from faults.scenes import HERE, sha256
from faults.suite import Suite

from tpme.bench.measure.nvml import Nvml
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import CellResult, attempt_number, find_results, read_result
from tpme.bench.side_files import damage

pytestmark = [pytest.mark.faults, pytest.mark.slow]

WAITING = """
def stand(self, where):
    import os, time
    if os.environ.get("STAND") == where:
        with open(os.environ["STANDS"], "w") as file:
            file.write(str(os.getpid()))
        while not os.path.exists(os.environ["STANDS"] + ".go"):
            time.sleep(0.02)

def adapt(self, model, schedule):
    if not next(model.parameters()).is_meta:
        self.stand("adapt")

def before_step(self, state):
    self.stand("step")

def on_epoch_end(self, state):
    self.stand("epoch")

def prepare_inference(self, model):
    self.stand("export")
"""


class RealRun:
    """``tpme run`` of one matrix in processes of its own, in which a cell can stand still."""

    def __init__(self, world: Any, harness: ModuleType, root: Path, methods: list[Any], **changes: Any) -> None:
        harness.write_method(root / "methods", "waiting", WAITING)
        self.root, self.run, self.stands, self.store = root, root / "run", root / "stands", root / "store"
        matrix = world.matrix(methods, modalities=["text"], **changes)
        world.write(root / "matrix.toml", matrix)

    def start(self, stand: str = "", **variables: str) -> subprocess.Popen[str]:
        where = ["--out", str(self.run), "--store", str(self.store), "--device", "cpu", "--no-report"]
        command = [sys.executable, "-m", "tpme.bench.cli", "run", str(self.root / "matrix.toml"), *where]
        own = {"STAND": stand, "STANDS": str(self.stands), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--methods-path", str(self.root / "methods")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | own | variables,
        )  # fmt: skip

    def standing(self, path: Path | None = None) -> int:
        """Until a process stands still; its id."""
        path, until = path or self.stands, time.monotonic() + 300
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < until, "nobody came to the place"
            time.sleep(0.05)
        return int(path.read_text().split()[0])

    def results(self) -> list[CellResult]:
        return [read_result(path) for path in find_results([self.run])]

    def completes(self) -> list[CellResult]:
        """The same command again: all cells end well, whole, and nothing is left."""
        before = {path: sha256(path) for path in self.run.rglob("*") if path.is_file() and self._is_finished(path)}
        process = self.start()
        out, err = process.communicate(timeout=400)
        assert (process.returncode, err) == (0, ""), (out, err)
        assert {path: sha256(path) for path in before} == before
        assert {result.status for result in self.results()} == {"ok"}
        for path in find_results([self.run]):
            assert damage(path, read_result(path)) is None
        hidden = [path for path in self.root.rglob(".*") if path.name not in (".lock", ".claimed")]
        assert hidden == []
        assert [p.pid for p in psutil.process_iter() if str(self.root) in " ".join(self._command_of(p))] == []
        return self.results()

    def _is_finished(self, path: Path) -> bool:
        number = attempt_number(Path(path.name.partition(".")[0]))
        record = path.with_name(f"attempt-{number}.json")
        return number > 0 and record.exists() and read_result(record).status == "ok"

    @staticmethod
    def _command_of(process: psutil.Process) -> list[str]:
        with contextlib.suppress(psutil.Error):
            return list(process.cmdline())
        return []


@pytest.fixture
def real(world: Any, harness: ModuleType, tmp_path: Path) -> Callable[..., RealRun]:
    return lambda *methods, **changes: RealRun(world, harness, tmp_path, list(methods), **changes)


@pytest.mark.about("real cells")
@pytest.mark.parametrize(
    ("where", "name", "target", "code", "status"),
    [
        ("adapt", "SIGKILL", "cell", 1, "killed"),
        ("step", "SIGTERM", "cell", 1, "killed"),
        ("epoch", "SIGKILL", "launcher", -9, None),
        ("step", "SIGINT", "launcher", 130, None),
        ("export", "SIGTERM", "launcher", 143, None),
    ],
)
def test_a_real_cell(
    suite: Suite, real: Callable[..., RealRun], where: str, name: str, target: str, code: int, status: str | None
) -> None:
    run = real("waiting")
    process = run.start(where)
    cell = run.standing()
    os.kill(cell if target == "cell" else process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (out, err)
    assert [result.status for result in run.results()] == ([status] if status else [])
    if status:
        assert run.results()[0].failure.message.startswith(f"its process was ended by {name}")
    [result] = run.completes()
    assert result.attempt == (2 if status else 1)
    suite.injections += 1


@pytest.mark.about("real cache build")
@pytest.mark.parametrize("number", [4, 9])
def test_a_real_cache_build(
    suite: Suite, real: Callable[..., RealRun], world: Any, tmp_path: Path, number: int
) -> None:
    run = real({"name": "frozen", "cached": True})
    hit = tmp_path / "hit"
    fault = {"role": "builder", "number": number, "kind": "kill before", "hit": str(hit)}
    plan = {"roots": [str(run.store)], "fault": fault}
    process = run.start(PYTHONPATH=str(HERE / "shim"), TPME_FAULT=json.dumps(plan))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (1, ""), (out, err)
    assert hit.exists()
    [failed] = run.results()
    assert failed.failure.message == "building the feature cache failed: its process was ended by signal 9"
    run.completes()
    suite.injections += 1


@pytest.mark.about("real sampler")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_real_sampler(suite: Suite, real: Callable[..., RealRun], name: str) -> None:
    run = real("waiting")
    process = run.start("step")
    cell = psutil.Process(run.standing())
    [sampler] = [one for one in cell.children() if "sampler_process" in " ".join(one.cmdline())]
    sampler.send_signal(getattr(signal, name))
    Path(f"{run.stands}.go").touch()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, ""), (out, err)
    [result] = run.results()
    assert any(flag.code == "sampler" and "ended before the run did" in flag.message for flag in result.flags)
    assert not sampler.is_running()
    run.completes()
    suite.injections += 1


@pytest.mark.about("compilation")
def test_a_compilation(
    suite: Suite, real: Callable[..., RealRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    run = real("lora", training={"compile": True, "epochs": 3})
    process = run.start()
    until = time.monotonic() + 300
    while not list(compiled.rglob("*.so")) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    run.completes()
    suite.injections += 1


# --- memory, numbers and drivers: in this process ------------------------------------------------------------------


def step_that(what: str, at: int) -> str:
    return f"""
    def before_step(self, state):
        self.count = getattr(self, "count", 0) + 1
        if self.count == {at}:
            {what}
    """


@pytest.mark.about("memory of host and allocator")
@pytest.mark.parametrize(
    "what",
    [
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
        "self.held = torch.empty(2**55, dtype=torch.uint8)",
    ],
)
def test_the_allocator_runs_out(suite: Suite, run_cell: Callable[..., CellResult], what: str) -> None:
    step = suite.drawn(what).randint(1, 4)
    result = run_cell(step_that(what, step), training={"epochs": 2, "max_steps_per_epoch": 2})
    suite.injections += 1
    assert result.status == "oom"
    assert (result.failure.epoch, result.failure.step) == ((step + 1) // 2, 2 - step % 2)


@pytest.mark.about("memory of host and allocator")
def test_the_host_runs_out(suite: Suite, real: Callable[..., RealRun], harness: ModuleType) -> None:
    """A limit on the address space of the cell, as the batch system of a cluster sets one."""
    body = """
    def before_step(self, state):
        import resource
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))
        self.held = torch.ones(2**27)
    """
    run = real("hungry")
    harness.write_method(run.root / "methods", "hungry", body)
    process = run.start()
    out, err = process.communicate(timeout=300)
    suite.injections += 1
    [result] = run.results()
    assert (process.returncode, err, result.status) == (0, "", "oom"), (out, err, result.failure)
    again = run.start()
    assert again.wait(300) == 0
    assert [one.attempt for one in run.results()] == [1], "out of memory is a result"


@pytest.mark.about("a loss that is no number")
def test_a_loss_that_is_no_number(suite: Suite, run_cell: Callable[..., CellResult]) -> None:
    step = suite.drawn("nan").randint(1, 6)
    body = f"""
    def losses(self, outputs):
        self.count = getattr(self, "count", 0) + 1
        loss = outputs["task"].loss
        return {{"task": loss * float("nan") if self.count == {step} else loss}}
    """
    result = run_cell(body, training={"epochs": 3, "max_steps_per_epoch": 2})
    suite.injections += 1
    assert (result.status, "ranks" in result.files) == ("diverged", False)
    assert (result.failure.epoch, result.failure.step) == ((step + 1) // 2, 2 - step % 2)


@pytest.mark.about("a driver that dies")
def test_a_driver_that_dies(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings of NVML: the phase is recorded, and its readings are missing with the reason."""
    gpu = FakeGpu()
    monkeypatch.setattr("tpme.bench.measure.phases.select_gpu", lambda nvml, _device: nvml.find(gpu.uuid))
    nvml = Nvml.open(fake_nvml(gpu))
    log = PhaseLog("cpu", None, nvml)
    log._attach(nvml)
    with log.phase("train", "epoch 1"):
        gpu.lost = True
    suite.injections += 1
    [phase] = log.phases
    assert phase.energy_j.value is None
    assert "lost" in str(phase.energy_j.reason).lower()


# --- tpme ab --------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Path]:
    top = tmp_path / "repository"
    (top / "methods").mkdir(parents=True)
    (top / "methods" / "mine.py").write_text(
        "from tpme.methods.base import Method\nclass M(Method): pass\nMETHOD = M\n"
    )

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(top), *words], check=True, capture_output=True)

    git("init", "-q")
    git("config", "user.email", "somebody@example.org")
    git("config", "user.name", "Somebody")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    yield top
    shutil.rmtree(top)


@pytest.mark.about("tpme ab")
def test_a_killed_comparison_leaves_nothing_to_the_next(
    suite: Suite, world: Any, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    matrix = world.write(tmp_path / "m.toml", world.matrix(["mine"], modalities=["text"]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tpme.bench.cli", "ab", "HEAD", "HEAD", "--matrix", str(matrix)]
    command += ["--repository", str(repository), "--methods-path", str(repository / "methods"), "--rounds", "1"]
    command += ["--out", str(out), "--device", "cpu"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process, until = start(), time.monotonic() + 300
    while not list(out.glob("1/*/*/run-1/attempt-1.log")) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert list(temporary.glob("tpme-ab-*"))
    process = start()
    output = process.communicate(timeout=500)
    assert process.returncode in (0, 1, 2), output
    assert list(temporary.glob("tpme-*")) == []
    assert sorted(path.name for path in out.iterdir()) == ["1"]
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1
    suite.injections += 1
