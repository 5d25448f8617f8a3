"""The oracle itself: each of its clauses finds what breaks it, and an untouched run breaks none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import oracle
from faults.oracle import judge, readable
from faults.scenes import Done, Fault, Scene
from faults.suite import Suite

pytestmark = [pytest.mark.faults, pytest.mark.about("none: the oracle itself")]
FINE = Done(0, "", "")
FULL = Fault("matrix", "cell", 1, "write", "anywhere", "ENOSPC")


def finished(scene: Scene) -> Path:
    """Folder of the cell that was finished before."""
    [name] = scene.given
    return scene.run_folder / "cells" / name


def other(scene: Scene) -> Path:
    [folder] = set(scene.run_folder.glob("cells/*")) - {finished(scene)}
    return folder


def truncate(scene: Scene) -> None:
    path = other(scene) / "attempt-1.json"
    path.write_bytes(path.read_bytes()[:-20])


def time_out(scene: Scene) -> None:
    path = other(scene) / "attempt-1.json"
    failure = {"phase": "train", "message": "took longer"}
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"status": "timeout", "failure": failure}))


def run_again(scene: Scene) -> None:
    with scene.ran.open("a") as ran:
        ran.write(f"{finished(scene).name} 1\n")


@contextlib.contextmanager
def a_process(scene: Scene) -> Iterator[None]:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"FAULT_SCENE": scene.identity})
    yield
    process.send_signal(signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def a_lock(scene: Scene) -> Iterator[None]:
    scene.store.mkdir(exist_ok=True)
    with (scene.store / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def a_block(scene: Scene) -> Iterator[None]:
    """In another folder: other tests look into the real one."""
    (scene.root / "shm").mkdir()
    (scene.root / "shm" / "block").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "MEMORY", scene.root / "shm")
        yield


HARMS: dict[str, Callable[[Scene], object]] = {
    "half a record": truncate,
    "half a file": lambda scene: (scene.run_folder / "cells.json").write_text("{"),
    "of a finished cell changed": lambda scene: (finished(scene) / "attempt-1.log").write_text("more"),
    "files missing: ['run/cells/": lambda scene: (other(scene) / "attempt-1.log").unlink(),
    "too many: ['store/stray']": lambda scene: (scene.store.mkdir(exist_ok=True), (scene.store / "stray").touch()),
    "a finished cell ran again": run_again,
    "it said that all was done": lambda scene: shutil.rmtree(other(scene)),
    "a timeout before the time had passed": time_out,
}
LEFT = {"a process is left": a_process, "lock: held": a_lock, "shared memory is left": a_block}
SAID = {
    "it hangs": Done(None, "", ""),
    "not one sentence": Done(1, "", "tpme: one\ntpme: two\n"),
    "not a sentence of tpme": Done(1, "", "Killed\n"),
    "the path or the reason is not named": Done(2, "", "tpme: it failed\n"),
    "not hit": FINE,
}


@pytest.fixture
def scene(suite: Suite) -> Scene:
    scene = suite.scene("matrix")
    done = scene.run()
    assert (done.code, done.err) == (0, "")
    return scene


def test_nothing_is_wrong_with_an_untouched_run(suite: Suite, scene: Scene) -> None:
    assert judge(scene, suite.of("matrix"), FINE, None, hit=False) == []
    assert readable(scene) == []


@pytest.mark.parametrize("clause", HARMS)
def test_harm_is_found(suite: Suite, scene: Scene, clause: str) -> None:
    HARMS[clause](scene)
    assert clause in "\n".join(judge(scene, suite.of("matrix"), FINE, None, hit=False))


@pytest.mark.parametrize("clause", LEFT)
def test_what_is_left_is_found(suite: Suite, scene: Scene, clause: str) -> None:
    with LEFT[clause](scene):
        assert clause in "\n".join(judge(scene, suite.of("matrix"), FINE, None, hit=False))


@pytest.mark.parametrize("clause", SAID)
def test_what_is_not_one_true_sentence_is_found(suite: Suite, scene: Scene, clause: str) -> None:
    assert clause in "\n".join(judge(scene, suite.of("matrix"), SAID[clause], FULL, hit=clause == "not hit"))


def test_a_record_that_cannot_be_read_is_found(scene: Scene) -> None:
    truncate(scene)
    assert "attempt-1.json" in "\n".join(readable(scene))
