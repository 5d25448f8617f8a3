"""Locks that name their owner: real processes, killed ones, and owners on other machines."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tpme.bench import owner_lock, slurm_commands
from tpme.bench.owner_lock import OwnedError, Owner, owned, read_owner, shared_by_machines
from tpme.bench.run import launch
from tpme.bench.slurm_commands import SlurmError
from tpme.bench.task.workspace import workspace

HOLD = """
import sys, time
from pathlib import Path
from tpme.bench.owner_lock import owned
with owned(Path(sys.argv[1]), force=True):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def elsewhere(**changes: object) -> Owner:
    """An owner on another machine."""
    return Owner.here().model_copy(update={"host": "node7", "machine": "other boot 1", **changes})


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_owner_keeps_the_lock_and_a_killed_one_loses_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".owner"
    process = hold(path)
    try:
        with pytest.raises(OwnedError, match=rf"held by process {process.pid} on .*; wait for it, or delete this file"):
            owned(path).__enter__()
    finally:
        process.kill()
        process.wait()
    assert read_owner(path) is not None, "it was killed"
    with owned(path):
        owner = read_owner(path)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_another_process_with_the_number_of_the_dead_owner_is_not_it(tmp_path: Path) -> None:
    path = tmp_path / ".owner"
    path.write_text(Owner.here().model_copy(update={"started": 1}).model_dump_json())
    with owned(path):
        pass
    assert not path.exists()


def test_an_owner_on_another_machine_is_nobodys_to_judge_but_the_schedulers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / ".owner", []
    path.write_text(elsewhere().model_dump_json())
    with pytest.raises(OwnedError, match="on node7; wait for it, or delete this file"):
        owned(path).__enter__()
    path.write_text(elsewhere(job="12", restarts=1).model_dump_json())

    def unanswered(*_: object) -> bool:
        raise SlurmError("no answer")

    monkeypatch.setattr(owner_lock, "is_running", unanswered)
    with pytest.raises(OwnedError, match="on node7, Slurm job 12; wait"):
        owned(path).__enter__()
    for runs in (True, False):
        monkeypatch.setattr(
            owner_lock, "is_running", lambda job, restarts, runs=runs: asked.append((job, restarts)) or runs
        )
        if runs:
            with pytest.raises(OwnedError):
                owned(path).__enter__()
    with owned(path):
        assert asked == [("12", 1)] * 2
        owner = read_owner(path)
        assert owner is not None
        assert owner.job is None


def test_of_an_array_the_owners_own_task_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job with the number of the array is one of its tasks; Slurm shows all of them."""
    states = ["JobId=7 ArrayJobId=7 JobState=CANCELLED Restarts=0", "JobId=8 ArrayJobId=7 JobState=RUNNING Restarts=1"]
    for shown in (states, states[::-1]):
        monkeypatch.setattr(slurm_commands, "ask", lambda *_, shown=shown: "\n".join(shown))
        assert not slurm_commands.is_running("7", 0)
        assert slurm_commands.is_running("8", 1)
        assert not slurm_commands.is_running("8", 0), "it was queued again since"
        assert not slurm_commands.is_running("9", 0)


def test_a_machine_that_does_not_say_who_it_is_judges_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have no machine id; two of one name on two machines are not one that was started anew."""
    here = Owner.here().model_copy(update={"started": 1})
    for mine, other in (
        ("- boot 1", "- another-boot 1"),
        ("- -", "- -"),
        ("id - 1", "id - 1"),
        ("id - 1", "id boot 1"),
    ):
        monkeypatch.setattr(owner_lock, "_machine", lambda mine=mine: mine)
        assert not here.model_copy(update={"machine": other}).is_dead(), (mine, other)
    monkeypatch.setattr(owner_lock, "_machine", lambda: "- boot 1")
    assert here.model_copy(update={"machine": "- boot 1"}).is_dead(), "one machine, started once"


def test_a_restarted_machine_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_lock, "_machine", lambda: "id boot 1")
    here = Owner.here()
    before = " ".join([here.machine.split()[0], "another-boot", "1"])
    assert here.model_copy(update={"machine": before}).is_dead()
    assert not here.model_copy(update={"machine": before, "host": "node7"}).is_dead()


def test_one_of_many_breaks_a_lock_and_all_get_it_one_after_the_other(tmp_path: Path) -> None:
    path, trace = tmp_path / ".owner", tmp_path / "trace"
    path.write_text(Owner.here().model_copy(update={"started": 1}).model_dump_json())
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_enter, args=(path, trace)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    lines = trace.read_text().splitlines()
    assert len(lines) == 16
    assert all(a.split()[1] == b.split()[1] for a, b in zip(lines[::2], lines[1::2], strict=True)), lines
    assert list(tmp_path.iterdir()) == [trace]


def _enter(path: Path, trace: Path) -> None:
    with owned(path, force=True, waiting=lambda: None):
        for word in ("in", "out"):
            with trace.open("a") as file:
                file.write(f"{word} {os.getpid()}\n")
            time.sleep(0.02)


def test_it_is_made_where_machines_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".owner"
    assert not shared_by_machines(tmp_path)
    with owned(path):
        assert not path.exists()
    monkeypatch.setattr(owner_lock, "_file_system", lambda _: "nfs4")
    with owned(path):
        assert path.exists()
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with workspace(tmp_path / "cache") as folder:
        (owner,) = tmp_path.glob("*.owner")
        assert owner.name == ".cache.owner"
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_kind_of_file_system_is_that_of_the_nearest_mount() -> None:
    assert owner_lock._file_system(Path("/proc/1/nothing")) == "proc"
    assert owner_lock._file_system(Path("/nowhere/at/all")) == owner_lock._file_system(Path("/"))


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)


@pytest.mark.usefixtures("without_links")
def test_a_file_system_without_links_has_locks_too(tmp_path: Path) -> None:
    path = tmp_path / ".owner"
    with owned(path, force=True), pytest.raises(OwnedError, match=f"held by process {os.getpid()}"):
        owned(path).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_links")
def test_a_full_disk_leaves_no_lock_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Owner.model_dump_json
    answers = iter([real(Owner.here()), OSError(28, "No space left on device")])

    def full(_: Owner) -> str:
        if isinstance(answer := next(answers), OSError):
            raise answer
        return answer

    monkeypatch.setattr(Owner, "model_dump_json", full)
    with pytest.raises(OSError, match="No space left"):
        owned(tmp_path / ".owner", force=True).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_was_made_though_its_answer_was_lost_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def asked_again(source: Path, path: Path) -> None:
        link(source, path)
        link(source, path)

    monkeypatch.setattr(os, "link", asked_again)
    with owned(tmp_path / ".owner", force=True):
        assert read_owner(tmp_path / ".owner") is not None
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_is_still_writing_its_name_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / ".owner"
    path.write_text("")
    threading.Timer(0.3, path.write_text, [Owner.here().model_dump_json()]).start()
    with pytest.raises(OwnedError, match=f"held by process {os.getpid()}"):
        owned(path).__enter__()


def test_a_lock_that_says_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_lock, "NAMED_S", 0.0)
    (tmp_path / ".owner").write_text("")
    with pytest.raises(Exception, match="a lock that does not name its owner; delete it"):
        owned(tmp_path / ".owner").__enter__()


def test_a_run_folder_is_one_launchers_on_all_machines(tmp_path: Path) -> None:
    with launch.locked_run(tmp_path, shared=True):
        assert read_owner(tmp_path / ".owner") is not None
    (tmp_path / ".owner").write_text(elsewhere().model_dump_json())
    for shared in (True, False):
        with pytest.raises(Exception, match=r"another 'tpme run' is using it\. .*\.owner: held by .* on node7"):
            launch.locked_run(tmp_path, shared=shared).__enter__()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cache_of_a_killed_builder_is_free(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")  # on this machine its kernel knows better than the scheduler
    process = hold(tmp_path / ".cache.owner")
    os.kill(process.pid, number)
    process.wait()
    with workspace(tmp_path / "cache") as folder:
        assert folder.is_dir()
