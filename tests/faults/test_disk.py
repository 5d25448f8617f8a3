"""Disks that become read-only, by the shim, and real small file systems that fill up or become so."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults.oracle import judge
from faults.scenes import Fault, Scene
from faults.suite import Suite
from faults.test_every_call import ROLES

pytestmark = pytest.mark.faults
PLACES = [(scenario, role) for scenario, roles in ROLES.items() for role in roles]


@pytest.mark.about("read-only from a call on")
@pytest.mark.parametrize(("scenario", "role"), PLACES)
def test_a_write_is_refused(suite: Suite, scenario: str, role: str) -> None:
    faults = suite.of(scenario).faults(scenario, role, "EROFS")
    drawn = suite.drawn((scenario, role)).sample(faults, min(5, len(faults)))
    wrong = [problem for fault in drawn for problem in suite.inject(fault)]
    assert not wrong, "\n".join(wrong)


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small(suite: Suite) -> Iterator[tuple[Scene, Path]]:
    """A scene whose run folder is a file system of its own; skips where one may not mount any."""
    scene = suite.scene("matrix")
    kept = scene.root / "kept"
    scene.run_folder.rename(kept)
    scene.run_folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(scene.run_folder)):
        pytest.skip("this user may not mount a file system")
    shutil.copytree(kept, scene.run_folder, dirs_exist_ok=True)
    yield scene, scene.run_folder
    subprocess.run(["umount", "-l", str(scene.run_folder)], check=True)


@pytest.mark.about("a small file system that fills up")
@pytest.mark.parametrize("free_kb", [0, 4, 8, 12, 16, 20, 24, 28, 32, 40])
def test_a_small_disk(suite: Suite, small: tuple[Scene, Path], free_kb: int) -> None:
    scene, folder = small
    size = shutil.disk_usage(folder).used + free_kb * 1024
    assert mount("-o", f"remount,size={size}", str(folder))
    done = scene.run()
    assert mount("-o", "remount,size=16m", str(folder))
    full = Fault("matrix", "", 0, "", "", "ENOSPC")
    wrong = judge(scene, suite.of("matrix"), done, full if done.code else None, hit=False)
    suite.injections += 1
    assert not wrong, "\n".join(wrong)


@pytest.mark.about("a file system that becomes read-only")
@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("role", ["launcher", "cell"])
def test_it_becomes_read_only(suite: Suite, small: tuple[Scene, Path], role: str, draw: int) -> None:
    scene, folder = small
    fault = suite.drawn((role, draw)).choice(suite.calls(role))
    command = scene.start(fault)
    scene.wait_for_hit()
    remounted = mount("-o", "remount,ro", str(folder))  # refused while a file is open for writing
    scene.go()
    done = command.wait()
    assert mount("-o", "remount,rw", str(folder))
    wrong = judge(scene, suite.of("matrix"), done, replace(fault, kind="EROFS") if remounted else None)
    suite.injections += 1
    assert not wrong, "\n".join(wrong)
