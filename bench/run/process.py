"""Run the process of one cell: show its progress, limit its time, and end everything it started.

The process leads its own session: Ctrl-C in a terminal reaches the launcher alone. What it started ends with it, also
in sessions of its own (``tpme.bench.lifetimes``), and it ends with the launcher.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tpme.bench.lifetimes import MARK, Launcher, end_cell
from tpme.bench.workers import parse_progress

GRACE_S = 10.0
"""Time a process has to write its record, or to clean up, before it is killed."""
POLL_S, SETTLE_S = 0.2, 0.5
PATIENT = {"GOMP_SPINCOUNT": "5000"}
"""Threads of torch's CPU kernels wait for each other by spinning, for milliseconds by default. Where anything else
runs on the cores, they then spin while the thread they wait for cannot run, and a step takes many times as long. On two
idle cores this bound takes nothing from a step (libgomp's own for crowded cores, 1000, made it 1.5 times as long);
beside a busy process a step took 4 times as long, with 20 times this bound 37 times. The environment may set another.
"""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Ending:
    """How a process ended; a negative ``code`` is the signal that killed it."""

    code: int
    timed_out: bool
    last: str = field(default="start", compare=False)
    """What it said last that it was doing."""


@dataclass(frozen=True)
class Supervision:
    """How a process is run, or each of several that belong together."""

    limit_s: float
    """Then it gets SIGTERM, and is killed after ``GRACE_S``."""
    show: Callable[[str, float], None] = lambda *_: None
    """Called with its progress, and again with the last of it while there is nothing new."""
    hear: Callable[[str], None] | None = None
    """Called with every other line of its standard output."""
    lock: int | None = None
    """An open file that this process has locked. The process holds the lock, too: should it outlive this one, nobody
    else gets the lock."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of the process."""
    caught: list[int] | None = None
    """Of ``deferred_signals`` in the main thread, for a call in another thread, to which no signal comes."""

    @contextlib.contextmanager
    def signals(self) -> Iterator[list[int]]:
        """The signals that have come, which do nothing else within the block."""
        with deferred_signals() if self.caught is None else contextlib.nullcontext(self.caught) as caught:
            yield caught


def run_process(command: Sequence[str], log: Path, how: Supervision) -> Ending:
    """Run ``command`` to its end, at most ``how.limit_s``.

    Args:
        command: writes progress events to its standard output (``workers.progress_line``).
        log: takes its standard error.

    Raises:
        KeyboardInterrupt, SystemExit: SIGINT, or SIGTERM or SIGHUP, came meanwhile; the process has been ended.
    """
    deadline = time.monotonic() + how.limit_s
    launcher = Launcher.here(deadline, how.lock)
    with how.signals() as caught:
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env=PATIENT | os.environ | dict(how.variables) | {MARK: launcher.mark},
                pass_fds=() if how.lock is None else (how.lock,),
            )
        watch = OutputWatch(process, how.show, how.hear)
        try:
            timed_out = watch.until(deadline, caught)
            if process.returncode == -signal.SIGTERM and not caught:
                wait_for_signal(caught)
            if caught or timed_out:
                _request_end(process, signal.SIGINT if caught else signal.SIGTERM)
        finally:
            kill_session(process)
            end_cell(launcher)
    if caught:
        raise_signal(caught[0])
    return Ending(process.returncode, timed_out, watch.last[0])


def raise_signal(number: int) -> NoReturn:
    """End this program: KeyboardInterrupt for SIGINT, SystemExit with 128 + the signal for any other."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect the signals that would end the program instead of acting on them. Ignored ones stay ignored."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread sets and runs handlers
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    handled = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in handled:
        signal.signal(number, lambda number, _frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


class OutputWatch:
    """Shows the progress of a process.

    The end of its output is not its end, nor the other way round: a child may hold the output open, and a process may
    close it and hang.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], show: Callable[[str, float], None], hear: Callable[[str], None] | None
    ) -> None:
        assert process.stdout is not None
        self.process, self.show, self.hear, self.output = process, show, hear, process.stdout
        self.last, self._buffered = ("start", 0.0), b""

    def until(self, deadline: float, caught: list[int], stopped: Callable[[], bool] = lambda: False) -> bool:
        """Until the process ends, its time is up, a signal arrives or it is ``stopped``; returns whether time is up."""
        os.set_blocking(self.output.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            while self.process.poll() is None and not caught and not stopped():
                if time.monotonic() >= deadline:
                    return True
                if not selector.get_map():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(POLL_S)
                elif not selector.select(POLL_S):
                    self.show(*self.last)
                elif not self._read():
                    selector.unregister(self.output)
        if self.process.poll() is not None:
            self._read()  # its last words
        return False

    def _read(self) -> bool:
        """Read what there is; returns whether there may be more."""
        read = self.output.read()
        if not read:
            return read is None
        *lines, self._buffered = (self._buffered + read).split(b"\n")
        for line in (line.decode(errors="replace") for line in lines):
            if (event := parse_progress(line)) is not None:
                self.last = event
                self.show(*event)
            elif self.hear is not None:
                self.hear(line)
        return True


def wait_for_signal(caught: list[int]) -> None:
    """Wait a moment for this process's own signal: a scheduler stops all processes of a job, in any order."""
    until_s = time.monotonic() + SETTLE_S
    while not caught and time.monotonic() < until_s:
        time.sleep(0.02)


def _request_end(process: subprocess.Popen[bytes], sign: signal.Signals) -> None:
    """Signal the process to end, and give it time to."""
    process.send_signal(sign)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
