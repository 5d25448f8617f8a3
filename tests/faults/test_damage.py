"""Files that are deleted, truncated or of which a bit flips, between runs and during one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from faults.oracle import half_written, judge, left_behind, readable, sentences
from faults.scenes import Scene
from faults.suite import Suite

from tpme.bench.errors import UserError
from tpme.bench.record import read_result

pytestmark = pytest.mark.faults
WAYS = ("deleted", "truncated", "flipped")


def harm(path: Path, way: str, drawn: random.Random) -> None:
    """Damage a file. A record has no checksum of itself: a flip that leaves it valid is not what is tested here."""
    content = path.read_bytes()
    if way == "deleted":
        path.unlink()
        return
    while True:
        place = drawn.randrange(len(content))
        if way == "truncated":
            path.write_bytes(content[:place])
        else:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << drawn.randrange(8)]) + content[place + 1 :])
        if path.suffix != ".json" or not is_record(path):
            return


def is_record(path: Path) -> bool:
    try:
        read_result(path)
    except UserError:
        return False
    return True


def complete(suite: Suite) -> Scene:
    scene = suite.scene("cache")
    assert scene.run().code == 0
    return scene


def victims(scene: Scene) -> list[str]:
    """Files of the run with content, and those of the cache."""
    return sorted(name for name in scene.files() if (scene.root / name).stat().st_size and "tmp/" not in name)


@pytest.mark.about("files damaged between runs")
@pytest.mark.parametrize("way", WAYS)
def test_between_runs(suite: Suite, way: str) -> None:
    wrong = []
    untouched = suite.of("cache")
    for name in victims(complete(suite)):
        scene = complete(suite)
        cached = name.startswith("store/")
        if cached:  # only a cell that runs reads it
            for path in scene.run_folder.glob("cells/stored-*/*"):
                path.unlink()
        kept = scene.finished()
        harm(scene.root / name, way, suite.drawn((name, way)))
        done = scene.run()
        suite.injections += 1
        found = [f"{way} {name}: {problem}" for problem in (*half_written(scene), *left_behind(scene))]
        if done.code != 0 or done.err:
            found.append(f"{way} {name}: {done}")
        now = scene.finished()
        if len(now) != 2:
            found.append(f"{way} {name}: not all is measured: {done}")
        is_log = name.endswith(".log")
        for cell, files in kept.items():
            if f"/{cell}/" not in name and any(now.get(cell, {}).get(file) != of for file, of in files.items()):
                found.append(f"{way} {name}: {cell} changed")
        measured = f"{name.rpartition('/')[2]}" in done.out and "measured again" in done.out
        if "/cells/" in name and not is_log and not (way == "deleted" and name.endswith(".json")) and not measured:
            found.append(f"{way} {name}: no line says so: {done.out}")
        built = name.endswith((".npy", "manifest.json")) and not (way == "deleted" and "manifest" in name)
        if built and "damaged and was built again" not in done.out:
            found.append(f"{way} {name}: no line says so: {done.out}")
        if not is_log and untouched.files - scene.files() - numbered(untouched.files):
            found.append(f"{way} {name}: files are missing")
        found += readable(scene) if suite.drawn((way, name)).random() < 0.1 else []
        wrong += found
    assert not wrong, "\n".join(wrong)


def numbered(files: frozenset[str]) -> set[str]:
    return {name for name in files if "attempt-" in name}


@pytest.mark.about("files damaged during a run")
@pytest.mark.parametrize("way", WAYS)
def test_during_a_run(suite: Suite, way: str) -> None:
    """While launcher or cell stands at a drawn call, a drawn file of the run is damaged."""
    wrong = []
    calls = [fault for role in ("launcher", "cell") for fault in suite.calls(role)]
    for number in range(8):
        drawn = suite.drawn(("during", way, number))
        fault = drawn.choice(calls)

        def act(scene: Scene, _pid: int, _parent: int, drawn: random.Random = drawn) -> None:
            files = [name for name in victims(scene) if not name.endswith(".log")]
            harm(scene.root / drawn.choice(files), way, drawn)

        with suite.at(fault, act) as (scene, done):
            again = scene.run()  # what is damaged is made again here
            if again.code != 0 or sentences(again):
                wrong.append(f"{fault} {way}: the same command again: {again}")
            scene.given = {}  # may be what was damaged
            wrong += [f"{fault} {way}: {problem}" for problem in judge(scene, suite.of("matrix"), done, None)]
    assert not wrong, "\n".join(wrong)
