"""Signals to launcher, cell and builder while one of them stands at a call: nothing is timed by a sleep."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from faults.oracle import judge, left_behind
from faults.scenes import PLAIN, Fault, Scene
from faults.suite import Suite

from tpme.bench.measure import sampler

pytestmark = pytest.mark.faults
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGSTOP")
WHERE = (
    ("matrix", "launcher", "itself"),
    ("matrix", "cell", "itself"),
    ("matrix", "cell", "parent"),
    ("cache", "builder", "itself"),
    ("cache", "builder", "parent"),
    ("prepare", "launcher", "itself"),
    ("prepare", "worker", "itself"),
    ("prepare", "worker", "parent"),
)
DRAWS = 3


def drawn_calls(suite: Suite, scenario: str, role: str, what: object, count: int) -> list[Fault]:
    faults = suite.of(scenario).faults(scenario, role, "barrier")
    return suite.drawn((scenario, role, what)).sample(faults, min(count, len(faults)))


def stop_for_a_while(scene: Scene, pid: int) -> None:
    """Stop a process until nothing else of the scene can go on without it."""
    process = psutil.Process(pid)
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.005)
    scene.go()
    until = time.monotonic() + 0.3
    while time.monotonic() < until and any(one.pid != pid for one in scene.processes()):
        time.sleep(0.01)
    process.resume()


@pytest.mark.about("signals at a call")
@pytest.mark.parametrize(("scenario", "role", "target"), WHERE)
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal(suite: Suite, name: str, scenario: str, role: str, target: str) -> None:
    wrong = []
    for fault in drawn_calls(suite, scenario, role, (name, target), DRAWS):

        def act(scene: Scene, pid: int, parent: int) -> None:
            whom = pid if target == "itself" else parent
            if name == "SIGSTOP":
                stop_for_a_while(scene, whom)
            else:
                os.kill(whom, getattr(signal, name))

        with suite.at(fault, act) as (scene, done):
            if name == "SIGSTOP" and done.code != 0:
                wrong.append(f"{fault}: stopped and continued, it ended otherwise: {done}")
            wrong += [
                f"{fault} {name} to {target}: {problem}" for problem in judge(scene, suite.of(scenario), done, None)
            ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.about("launcher or cell killed while others write")
@pytest.mark.parametrize("role", ["cell", "builder"])
def test_whoever_is_left_alone_dies(suite: Suite, role: str) -> None:
    """Killed at every call of a cell or builder: the launcher, so that it stands there as an orphan."""
    wrong = []
    for fault in suite.calls(role):
        alone: list[bool] = []

        def act(scene: Scene, pid: int, parent: int, alone: list[bool] = alone) -> None:
            launcher = parent if role == "cell" else psutil.Process(parent).ppid()
            os.kill(launcher, signal.SIGKILL)
            until = time.monotonic() + 10
            while time.monotonic() < until and (left := {pid, parent} & {one.pid for one in scene.processes()}):
                time.sleep(0.01)
            alone.append(bool(left))

        with suite.at(fault, act) as (scene, done):
            if any(alone):
                wrong.append(f"{fault}: it outlives its launcher")
            if done.code != -signal.SIGKILL:
                wrong.append(f"{fault}: {done}")
            wrong += [f"{fault}: {problem}" for problem in judge(scene, suite.of(fault.scenario), done, None)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.about("processes of a method")
@pytest.mark.parametrize("killed", [False, True])
def test_a_child_of_a_method_does_not_outlive_its_cell(suite: Suite, killed: bool) -> None:
    """A child in a session of its own that ignores SIGTERM; with ``killed`` its cell and launcher are killed first."""
    scene = suite.scene("matrix", methods='{ name = "parent", child = 1 }')
    if killed:
        command = scene.start(Fault("matrix", "cell", 8, "", "", "barrier"))
        pid, parent, *_ = scene.wait_for_hit()
        for number in (int(parent), int(pid)):
            os.kill(number, signal.SIGKILL)
        assert command.wait().code == -signal.SIGKILL
        assert scene.processes(), "nothing is left that could be found"
        scene.ran.with_name("ran.child").unlink()
    done = scene.run()
    assert (done.code, done.err) == (0, "")
    assert left_behind(scene) == []
    suite.injections += 1


@pytest.mark.about("time limit")
@pytest.mark.parametrize("stopped", [False, True])
def test_only_the_time_limit_is_a_timeout(suite: Suite, stopped: bool) -> None:
    """Of a cell that waits, and of one that is stopped and cannot even say so."""
    scene = suite.scene("matrix", methods=PLAIN)
    scene.write_matrix(PLAIN, limit_s=2)
    command = scene.start(Fault("matrix", "cell", 8, "", "", "barrier"))
    pid, *_ = scene.wait_for_hit()
    if stopped:
        os.kill(int(pid), signal.SIGSTOP)
    done = command.wait()  # nobody lets it go: its time passes
    assert done.code == 1
    [(_, record)] = scene.cells().values()
    assert record is not None
    assert (record.status, scene.started()) == ("timeout", scene.started()[:1])
    assert scene.run().code == 1, "a timeout is repeated only with more time"
    assert len(scene.started()) == 1
    suite.injections += 1


@pytest.mark.about("signals to the sampler")
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_the_sampler(suite: Suite, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had read is there, and a note says that it ended early; Ctrl-C is not for it."""
    monkeypatch.setattr(sampler, "_STOP_S", 1.0)
    of_this = sampler.Sampler(period_s=0.01).start()
    pid, rows = of_this.pid, suite.drawn(name).randint(1, 20)
    while of_this.mark() < rows:
        time.sleep(0.005)
    os.kill(pid, getattr(signal, name))
    curve = of_this.stop()
    suite.injections += 1
    assert len(curve.t_s) >= rows
    assert any("ended before the run did" in note for note in curve.notes) == (name != "SIGINT")
    assert not psutil.pid_exists(pid)
