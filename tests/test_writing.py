"""Files that readers see whole or not at all, and that outlast a power cut."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from tpme.bench.writing import make_folder, write_atomically


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def broken(_handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=f"disk full: '{path}'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_writer_removes_what_killed_ones_left_and_no_other_file(tmp_path: Path) -> None:
    left, living, other = (tmp_path / name for name in (".x.json.abcdefgh", ".x.json.12345678", ".x.json.txt"))
    for path in (left, living, other):
        path.write_bytes(b"half")
    with living.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_atomically(tmp_path / "x.json", b"whole")
        assert {path.name for path in tmp_path.iterdir()} == {"x.json", living.name, other.name}
    write_atomically(tmp_path / "x.json", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", other.name}


def test_on_a_node_the_files_of_other_nodes_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose locks this node need not see."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (tmp_path / ".x.json.abcdefgh").write_bytes(b"half")
    write_atomically(tmp_path / "x.json", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", ".x.json.abcdefgh"}


def test_what_is_written_outlasts_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is synced before its name is given, the name before the writer goes on."""
    done = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "content")
        sync(handle)

    def noted_replace(*paths: str) -> None:
        done.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "x", b"content")
    assert done == ["content", "name", "folder"]


def test_a_reader_sees_all_or_nothing(tmp_path: Path) -> None:
    path, whole = tmp_path / "x", (b"a" * 300_000, b"b" * 300_000)
    write_atomically(path, whole[0])
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            write_atomically(path, whole[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= set(whole)


def test_a_folder_outlasts_a_power_cut_with_all_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync

    def noted_sync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted_sync)
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file" / "b")
