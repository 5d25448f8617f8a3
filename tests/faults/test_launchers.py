"""Several launchers at once, on one folder and on one store."""

from __future__ import annotations

import pytest
from faults.oracle import differing_files, half_written, left_behind
from faults.scenes import CACHED
from faults.suite import Suite

pytestmark = pytest.mark.faults


@pytest.mark.about("several launchers on one folder")
@pytest.mark.parametrize("time", range(2))
@pytest.mark.parametrize("count", [2, 5])
def test_on_one_folder(suite: Suite, count: int, time: int) -> None:
    scene = suite.scene("matrix")
    commands = [scene.start() for _ in range(count)]
    ended = [command.wait() for command in commands]
    suite.injections += 1
    assert any(done.code == 0 for done in ended), ended
    for done in ended:
        if done.code != 0:
            assert (done.code, len(done.err.splitlines())) == (2, 1), done
            assert "another 'tpme run' is using it" in done.err
    assert len(scene.started()) == 1, "a cell that two launchers started"
    assert half_written(scene) == []
    assert differing_files(scene, suite.of("matrix")) == []
    assert left_behind(scene) == []


@pytest.mark.about("several launchers on one store")
@pytest.mark.parametrize("count", [2, 5])
def test_on_one_store(suite: Suite, count: int) -> None:
    first, *others = [suite.scene("matrix", methods=CACHED) for _ in range(count)]
    for scene in others:
        scene.store = first.store
    commands = [scene.start() for scene in (first, *others)]
    ended = [command.wait() for command in commands]
    suite.injections += 1
    assert [(done.code, done.err) for done in ended] == [(0, "")] * count
    for scene in (first, *others):
        assert half_written(scene) == []
        assert left_behind(scene) == []
        assert [record.status for _, record in scene.cells().values() if record] == ["ok"]
    assert {path.name for path in first.store.rglob("*") if path.is_file()} == {"lock", "manifest.json", "states.npy"}
