"""What a launcher starts ends with it: bound to its life by the kernel, and marked in case it was killed itself.

The mark is an environment variable of the process of a cell, which everything that it starts inherits, also in sessions
of its own. It names the lock that the launcher holds: whoever holds that lock next ends what is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    import psutil

MARK = "TPME_LAUNCHER"
_PR_SET_PDEATHSIG = 1
_PATIENCE_S = 10.0


class Launcher(NamedTuple):
    """The process that started a cell, as the cell is told."""

    pid: int
    deadline_s: float
    """``time.monotonic``, which all processes of a machine share, of the cell's time limit."""
    lock: str
    """Device and inode of the lock that the launcher holds: containers may see other files by the same name."""

    @classmethod
    def here(cls, deadline_s: float, lock: int | None) -> Self:
        """This process, which holds the lock on the open file ``lock``."""
        if lock is None:
            return cls(os.getpid(), deadline_s, "-")
        status = os.fstat(lock)
        return cls(os.getpid(), deadline_s, f"{status.st_dev}:{status.st_ino}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The launcher of a mark; ``None`` for any other text."""
        try:
            pid, deadline_s, lock = text.split()
            return cls(int(pid), float(deadline_s), lock)
        except ValueError:
            return None

    @property
    def mark(self) -> str:
        """The value of the variable ``MARK``."""
        return f"{self.pid} {self.deadline_s!r} {self.lock}"


@contextlib.contextmanager
def marked(lock: int) -> Iterator[None]:
    """Mark whatever this process starts meanwhile, with the lock on the open file ``lock``."""
    before = os.environ.get(MARK)
    os.environ[MARK] = Launcher.here(math.inf, lock).mark
    try:
        yield
    finally:
        del os.environ[MARK]
        if before is not None:
            os.environ[MARK] = before


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends (Linux); exits if ``parent`` is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def die_with_launcher() -> Launcher | None:
    """Bind this process, that of a cell, to its launcher; returns that, or ``None`` for a cell started by hand."""
    launcher = Launcher.parse(os.environ.get(MARK, ""))
    if launcher is not None:
        die_with_parent(launcher.pid)
    return launcher


def end_cell(launcher: Launcher) -> None:
    """Kill what the cell of ``launcher`` started and left, in whatever session it is."""
    _kill(lambda of: of == launcher)


def end_orphans(lock: int) -> None:
    """Kill what earlier launchers left that held the lock on the open file ``lock``, which this process holds now."""
    mine = Launcher.here(0.0, lock)
    _kill(lambda of: of.lock == mine.lock)


def _kill(ours: Callable[[Launcher], bool]) -> None:
    """Kill every process with such a mark, until none is left: one may start others meanwhile."""
    import psutil

    until_s = time.monotonic() + _PATIENCE_S  # one that hangs in the kernel cannot die
    while time.monotonic() < until_s:
        left = [process for process in psutil.process_iter() if (of := _launcher(process)) is not None and ours(of)]
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)  # not psutil.wait_procs, which takes the exit codes of this process's own children


def _launcher(process: psutil.Process) -> Launcher | None:
    import psutil

    try:
        return None if process.pid == os.getpid() else Launcher.parse(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):  # it has ended, or is somebody else's
        return None
