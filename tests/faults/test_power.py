"""A power cut: all processes end at once, and what was not synced to disk is lost or torn."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from faults.oracle import MEMORY, changed, is_left, judge, shared_memory
from faults.scenes import Scene
from faults.suite import Suite

pytestmark = pytest.mark.faults


def lose(journal: Path, drawn: random.Random) -> None:
    """Take away what a file system may lose: bytes that were not synced, and names whose folder was not.

    Each loss is drawn by itself: a file system may write later changes before earlier ones.
    """
    unsynced: set[str] = set()
    new_names: set[str] = set()
    kept: dict[str, str] = {}
    for name, path, second in map(json.loads, journal.read_text().splitlines()):
        if name == "kept":
            kept.setdefault(path, second)
        elif name in ("open", "write", "ftruncate"):
            unsynced.add(path)
            if name == "open":
                new_names.add(path)
        elif name == "mkdir":
            new_names.add(path)
        elif name == "fsync":
            unsynced.discard(path)
            inside = {one for one in new_names | kept.keys() if os.path.dirname(one) == path}
            new_names -= inside
            for one in inside & kept.keys():
                os.unlink(kept.pop(one))
        elif name in ("replace", "rename"):
            for names in (unsynced, new_names):  # of a folder, what is in it
                moved = {one for one in names if one == path or one.startswith(f"{path}/")}
                names -= moved
                names |= {second + one.removeprefix(path) for one in moved}
            new_names.add(second)
        elif name in ("unlink", "remove", "rmdir"):
            unsynced.discard(path)
            new_names.discard(path)
    for path in sorted(unsynced):
        with contextlib.suppress(OSError):
            os.truncate(path, drawn.choice([0, drawn.randint(0, os.path.getsize(path))]))
    for path in sorted(new_names):
        if drawn.random() < 0.5:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    for path, old in sorted(kept.items()):
        if drawn.random() < 0.5 and os.path.isdir(os.path.dirname(path)):
            os.replace(old, path)
        else:
            os.unlink(old)


def cut(scene: Scene, launcher: int) -> None:
    """Kill all processes of a scene; memory is gone with them."""
    os.kill(launcher, signal.SIGKILL)
    while left := scene.processes():
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
    for name in filter(is_left, shared_memory() - scene.memory):  # semaphores; their tracker is dead, too
        (MEMORY / name).unlink(missing_ok=True)


def lasting(scene: Scene) -> dict[str, dict[str, str]]:
    """Of every finished cell, the files that outlast a power cut: a log does not."""
    return {
        name: {file: of for file, of in files.items() if not file.endswith(".log")}
        for name, files in scene.finished().items()
    }


@pytest.mark.about("power cuts")
@pytest.mark.parametrize(
    ("scenario", "role"), [("matrix", "launcher"), ("matrix", "cell"), ("cache", "builder"), ("prepare", "launcher")]
)
def test_a_power_cut(suite: Suite, scenario: str, role: str) -> None:
    """At every call of a role. What was finished before is not lost; what then is there is whole or made again."""
    wrong = []
    for fault in suite.of(scenario).faults(scenario, role, "barrier"):
        scene = suite.scene(scenario)
        journal = scene.root / "journal"
        journal.touch()
        command = scene.start(replace(fault, kind="barrier"), journal=str(journal))
        scene.wait_for_hit()
        told = lasting(scene) if role == "launcher" else {}  # a cell itself may be about to sync what it wrote
        cut(scene, command.pid)
        done = command.wait()
        lose(journal, suite.drawn(fault))
        suite.injections += 1
        wrong += [f"{fault}: after the cut, {problem}" for problem in changed(told, scene.finished())]
        wrong += [f"{fault}: {problem}" for problem in judge(scene, suite.of(scenario), done, None)]
    assert not wrong, "\n".join(wrong)
