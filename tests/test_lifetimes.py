"""What a launcher starts ends with it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tpme.bench.lifetimes import MARK, Launcher, end_cell, end_orphans, marked

PARENT = """
import os, subprocess, sys, time
code = "import sys, time; from tpme.bench.lifetimes import die_with_parent; die_with_parent(int(sys.argv[1])); "
child = subprocess.Popen([sys.executable, "-c", code + "print('bound', flush=True); time.sleep(600)", {parent}],
                         stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""

LAUNCHER = """
import os, subprocess, sys, time
from tpme.bench.lifetimes import MARK, Launcher
command = [sys.executable, "-m", "{module}", "no job"]
mark = os.environ | {{MARK: Launcher.here(1e9, None).mark}}
cell = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, env=mark)
assert cell.stdout.readline() == b"loading\\n"
print(cell.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield handle
    os.close(handle)


def sleeper(**variables: str) -> subprocess.Popen[bytes]:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", stubborn],
        stdout=subprocess.PIPE, start_new_session=True, env=os.environ | variables,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_bound_process_dies_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.format(parent="str(os.getpid())")], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert psutil.wait_procs([child], timeout=30)[1] == []


@pytest.mark.parametrize("module", ["cell", "live_cell"])
def test_a_cell_dies_with_its_launcher_while_it_loads_its_libraries(tmp_path: Path, module: str) -> None:
    """It holds the lock of the run folder by then, and loading may take longer than another launcher waits for that."""
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    code = LAUNCHER.format(module=f"tpme.bench.run.{module}")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    ) as launcher:
        assert launcher.stdout is not None
        cell = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
    assert psutil.wait_procs([cell], timeout=30)[1] == []


def test_one_whose_parent_is_gone_already_ends_at_once() -> None:
    code = "from tpme.bench.lifetimes import die_with_parent; die_with_parent(1 << 22); print('lives on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_mark_can_be_read_again(lock: int) -> None:
    launcher = Launcher.here(12.345678901234567, lock)
    assert Launcher.parse(launcher.mark) == launcher
    for text in ("", "1 2", "a b c", "1 b c"):
        assert Launcher.parse(text) is None


def test_what_a_cell_left_is_ended_and_nothing_else(lock: int) -> None:
    mine, other = Launcher.here(1.0, lock), Launcher.here(2.0, lock)
    of_mine, of_other, of_nobody = sleeper(**{MARK: mine.mark}), sleeper(**{MARK: other.mark}), sleeper()
    try:
        end_cell(mine)
        assert of_mine.wait(30) == -signal.SIGKILL
        assert (of_other.poll(), of_nobody.poll()) == (None, None)
        end_orphans(lock)
        assert of_other.wait(30) == -signal.SIGKILL
        assert of_nobody.poll() is None
    finally:
        for process in (of_mine, of_other, of_nobody):
            process.kill()
            process.communicate()


def test_a_block_marks_what_is_started_in_it(lock: int) -> None:
    assert MARK not in os.environ
    with marked(lock):
        process = sleeper()
    assert MARK not in os.environ
    end_orphans(lock)
    assert process.wait(30) == -signal.SIGKILL
    process.communicate()
