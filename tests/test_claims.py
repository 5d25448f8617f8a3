"""Folders that go with the process that made them."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tpme.bench.claims import claimed, remove_unclaimed, scratch_folder

KILLED = """
import os, sys
from pathlib import Path
from tpme.bench.claims import scratch_folder
with scratch_folder("test") as (folder, lock):
    (folder / "large").write_text("content")
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_the_next_one_removes_what_a_killed_one_left(temporary: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert done.returncode == -signal.SIGKILL
    [left] = temporary.iterdir()
    assert (left / "large").exists()
    with scratch_folder("test") as (folder, _):
        assert list(temporary.iterdir()) == [folder]
        with scratch_folder("test") as (other, _):
            assert sorted(temporary.iterdir()) == sorted([folder, other]), "one whose process lives stays"
    assert list(temporary.iterdir()) == []


def test_a_folder_of_somebody_else_stays(temporary: Path) -> None:
    (temporary / "tpme-notes").mkdir()
    (temporary / "tpme-data-12345678").mkdir()
    (temporary / "tpme-data-12345678" / "file").touch()
    with scratch_folder("test"):
        pass
    assert sorted(path.name for path in temporary.iterdir()) == ["tpme-data-12345678", "tpme-notes"]


def test_a_folder_is_kept_only_where_all_went_well(tmp_path: Path) -> None:
    def make() -> Path:
        (tmp_path / "one").mkdir()
        return tmp_path / "one"

    with pytest.raises(ZeroDivisionError), claimed(make, keep=True):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with claimed(make, keep=True) as (folder, _):
        (folder / "record").touch()
    assert [path.name for path in folder.iterdir()] == ["record"]
    remove_unclaimed(folder)
    assert (folder / "record").exists()


def test_a_claim_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".claimed").symlink_to(tmp_path / "elsewhere")
    remove_unclaimed(tmp_path / "one")
    assert os.path.lexists(tmp_path / "one" / ".claimed")
    assert not (tmp_path / "elsewhere").exists()


def test_one_that_is_kept_just_then_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends between a look at its claim and the lock on that."""
    folder = tmp_path / "one"
    folder.mkdir()
    for name in (".claimed", "record"):
        (folder / name).touch()

    def kept_first(lock: int, how: int) -> None:
        (folder / ".claimed").unlink()
        flock(lock, how)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", kept_first)
    remove_unclaimed(folder)
    assert (folder / "record").exists()
