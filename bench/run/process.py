"""Run the process of one cell: show its progress, limit its time, and end everything it started.

The process leads its own session: Ctrl-C in a terminal reaches the launcher alone, and everything the process started
can be ended with it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tpme.bench.workers import parse_progress

GRACE_S = 10.0
"""Time a process has to write its record, or to clean up, before it is killed."""
POLL_S = 0.2
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


def run_process(
    command: Sequence[str],
    *,
    log: Path,
    limit_s: float,
    show: Callable[[str, float], None] = lambda *_: None,
    hear: Callable[[str], None] | None = None,
) -> Ending:
    """Run ``command`` to its end, at most ``limit_s``.

    Args:
        command: writes progress events to its standard output (``workers.progress_line``).
        log: takes its standard error.
        limit_s: then it gets SIGTERM, and is killed after ``GRACE_S``.
        show: called with its progress, and again with the last of it while there is nothing new.
        hear: called with every other line of its standard output.

    Raises:
        KeyboardInterrupt, SystemExit: SIGINT, or SIGTERM or SIGHUP, came meanwhile; the process has been ended.
    """
    deadline = time.monotonic() + limit_s
    with _deferred_signals() as caught:
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env=PATIENT | os.environ,
            )
        try:
            timed_out = _watch(process, deadline, caught, show, hear)
            if caught or timed_out:
                _request_end(process, signal.SIGINT if caught else signal.SIGTERM)
        finally:
            _kill_session(process)
    if caught:
        raise_signal(caught[0])
    return Ending(process.returncode, timed_out)


def raise_signal(number: int) -> NoReturn:
    """End this program: KeyboardInterrupt for SIGINT, SystemExit with 128 + the signal for any other."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
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


def _watch(
    process: subprocess.Popen[bytes],
    deadline: float,
    caught: list[int],
    show: Callable[[str, float], None],
    hear: Callable[[str], None] | None,
) -> bool:
    """Show progress until the process ends, its time is up or a signal arrives; returns whether its time is up.

    The end of its output is not its end, nor the other way round: a child may hold the output open, and a process may
    close it and hang.
    """
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    buffered, last = b"", ("start", 0.0)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while process.poll() is None and not caught:
            if time.monotonic() >= deadline:
                return True
            if not selector.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
            elif selector.select(POLL_S):
                read = process.stdout.read()
                if not read:
                    selector.unregister(process.stdout)
                    continue
                *lines, buffered = (buffered + read).split(b"\n")
                for line in (line.decode(errors="replace") for line in lines):
                    if (event := parse_progress(line)) is not None:
                        last = event
                        show(*event)
                    elif hear is not None:
                        hear(line)
            else:
                show(*last)
    return False


def _request_end(process: subprocess.Popen[bytes], sign: signal.Signals) -> None:
    """Signal the process to end, and give it time to."""
    process.send_signal(sign)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and of everything it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
