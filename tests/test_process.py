"""The process of a cell: watched, limited in time, and ended with everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tpme.bench.run import process
from tpme.bench.run.process import Ending, Supervision, run_process

FOREVER = 120.0
"""A limit that no test reaches."""
CHILD = """
import os, subprocess, sys
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
open({path!r}, "w").write(str(child.pid))
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ending]:
    def call(program: str, limit_s: float = FOREVER, **settings: Any) -> Ending:
        command = [sys.executable, "-c", program]
        return run_process(command, tmp_path / "log", Supervision(limit_s, **settings))

    return call


def is_gone(pid: int) -> bool:
    """Ended; a zombie that nobody has collected counts. Waits a little: a killed process takes a moment to die."""
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def wait_for(path: Path) -> str:
    for _ in range(1200):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


# --- watching -------------------------------------------------------------------------------------------------------


def test_progress_is_shown_and_everything_else_ignored(run: Callable[..., Ending], tmp_path: Path) -> None:
    program = """
import sys
print('{"what": "load", "share": 0.5}')
print("words of a library")
print('{"what": 3}')
sys.stdout.buffer.write(bytes([255, 10]))
print('{"what": "train", "share": 1}')
print("said", file=sys.stderr)
print('{"what": "without an end", "share": 1}', end="")
"""
    shown: list[tuple[str, float]] = []
    ending = run(program, show=lambda what, share: shown.append((what, share)))
    assert ending == Ending(code=0, timed_out=False)
    assert shown == [("load", 0.5), ("train", 1.0)]
    assert (tmp_path / "log").read_text() == "said\n"


def test_how_it_ended(run: Callable[..., Ending]) -> None:
    assert run("raise SystemExit(3)") == Ending(code=3, timed_out=False)
    assert run("import os; os.kill(os.getpid(), 9)") == Ending(code=-9, timed_out=False)


def test_it_reads_no_terminal_and_has_a_session_of_its_own(run: Callable[..., Ending]) -> None:
    program = "import os, sys; sys.exit(sys.stdin.read() != '' or os.getsid(0) != os.getpid())"
    assert run(program).code == 0


def test_no_file_stays_open(run: Callable[..., Ending]) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        run("pass")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_it_may_be_watched_from_a_thread(run: Callable[..., Ending]) -> None:
    endings = []
    thread = threading.Thread(target=lambda: endings.append(run("raise SystemExit(4)")))
    thread.start()
    thread.join()
    assert endings == [Ending(code=4, timed_out=False)]


# --- the time limit -------------------------------------------------------------------------------------------------


def test_when_its_time_is_up_it_is_asked_to_end(run: Callable[..., Ending], tmp_path: Path) -> None:
    program = f"""
import signal, sys, time
def end(*_):
    open({str(tmp_path / "ended")!r}, "w").write("in good order")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open({str(tmp_path / "ready")!r}, "w").write("yes")
time.sleep(600)
"""
    limit = threading.Event()
    monkey = pytest.MonkeyPatch()
    # The clock of the limit jumps once the program is ready, however long that takes.
    clock = time.monotonic
    monkey.setattr(process.time, "monotonic", lambda: clock() + (FOREVER if limit.is_set() else 0))
    watcher = threading.Thread(target=lambda: (wait_for(tmp_path / "ready"), limit.set()))
    watcher.start()
    try:
        assert run(program) == Ending(code=0, timed_out=True)
    finally:
        monkey.undo()
        watcher.join()
    assert (tmp_path / "ended").read_text() == "in good order"


@pytest.mark.parametrize(
    "stubborn",
    [
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); import time; time.sleep(600)",
        # It closes its output, which looks like its end, and hangs.
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.close(1); time.sleep(600)",
    ],
)
def test_one_that_does_not_end_is_killed(
    run: Callable[..., Ending], monkeypatch: pytest.MonkeyPatch, stubborn: str
) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    ending = run(stubborn, limit_s=1.0)
    assert ending.timed_out
    assert ending.code in (-signal.SIGKILL, -signal.SIGTERM)  # SIGTERM where it was not even ready


def test_what_it_started_ends_with_it(run: Callable[..., Ending], tmp_path: Path) -> None:
    path = tmp_path / "child"
    for program, code in (
        ("", 0),
        ("os.kill(os.getpid(), 9)", -9),
        # The child holds the output open, so there is no end of file.
        ("os._exit(5)", 5),
    ):
        assert run(CHILD.format(path=str(path)) + program).code == code
        assert is_gone(int(path.read_text()))


def test_a_watcher_that_breaks_leaves_nothing_behind(run: Callable[..., Ending], tmp_path: Path) -> None:
    path = tmp_path / "child"
    program = (
        CHILD.format(path=str(path))
        + """
print('{"what": "load", "share": 0.5}', flush=True)
import time; time.sleep(600)
"""
    )

    def show(what: str, share: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(program, show=show)
    assert is_gone(int(path.read_text()))


# --- signals --------------------------------------------------------------------------------------------------------

LAUNCHER = """
import signal, sys
from pathlib import Path
from tpme.bench.run import process
process.GRACE_S = 30.0
if {ignored}:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
try:
    process.run_process([sys.executable, "-c", {program!r}], Path({log!r}), process.Supervision(120))
except KeyboardInterrupt:
    print("interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def launch(tmp_path: Path, program: str, *, ignored: bool = False) -> subprocess.Popen[str]:
    text = LAUNCHER.format(program=program, log=str(tmp_path / "log"), ignored=ignored)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("sign", "code", "told"),
    [(signal.SIGINT, 0, "interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
def test_a_signal_ends_the_process_first_and_then_the_launcher(
    tmp_path: Path, sign: signal.Signals, code: int, told: str
) -> None:
    child, cleaned = tmp_path / "child", tmp_path / "cleaned"
    program = (
        CHILD.format(path=str(child))
        + f"""
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.5)
    open({str(cleaned)!r}, "w").write("yes")
"""
    )
    launcher = launch(tmp_path, program)
    pid = int(wait_for(child))
    time.sleep(0.3)  # until it sleeps
    launcher.send_signal(sign)
    time.sleep(0.1)
    launcher.send_signal(sign)  # an impatient second one changes nothing
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, out, err) == (code, told, "")
    assert cleaned.read_text() == "yes"
    assert is_gone(pid)


@pytest.mark.alone
def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    program = f"""
import os, time
open({str(tmp_path / "child")!r}, "w").write(str(os.getpid()))
while not os.path.exists({str(tmp_path / "go")!r}):
    time.sleep(0.05)
"""
    launcher = launch(tmp_path, program, ignored=True)
    wait_for(tmp_path / "child")
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert launcher.wait(timeout=60) == 0


def test_a_process_that_a_scheduler_ended_first_is_no_ending_of_its_own(
    run: Callable[..., Ending], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm signals all processes of a job, and this one may be told last."""
    dies = "import os; os.kill(os.getpid(), 15)"
    caught: list[int] = []
    assert run(dies, caught=caught).code == -signal.SIGTERM
    wait = process.wait_for_signal

    def late(caught: list[int]) -> None:
        threading.Timer(0.1, caught.append, [signal.SIGTERM]).start()
        wait(caught)

    monkeypatch.setattr(process, "wait_for_signal", late)
    with pytest.raises(SystemExit, match="143"):
        run(dies, caught=caught)
