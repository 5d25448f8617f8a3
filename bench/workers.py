"""Worker processes beside this one: Ctrl-C reaches this process alone, and workers end with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from tpme.bench.lifetimes import die_with_parent

_TRACKER_IS_QUIET = "ignore:resource_tracker:UserWarning"
"""For the process that clears away semaphores: where this one was killed it does so, and would warn of them."""
LISTENER = "TPME_LISTENER"
"""Variable of rank 0 of a cell on several devices: the open socket on which its ranks meet, by its descriptor.

Whoever started the ranks has opened it on a free port, which no other program can then take.
"""
Submit = Callable[..., Future[Any]]
"""``submit(function, *arguments)``: call a function of a module in a worker."""


def available_cores() -> int:
    """Processor cores this process may use; in a container or under taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_processes(
    count: int, prepare: Callable[..., None] | None = None, *arguments: Any, fork: bool = False
) -> Iterator[Submit]:
    """At most ``count`` processes, started on demand; pending work is cancelled at the end.

    Args:
        count: of processes.
        prepare: called with ``arguments`` in every process before its first work.
        fork: processes start with this one's memory instead of loading modules and unpickling ``arguments``; only
            safe while no other thread of this process holds a lock that they need.
    """
    if _TRACKER_IS_QUIET not in sys.warnoptions:
        sys.warnoptions.append(_TRACKER_IS_QUIET)  # multiprocessing hands them on
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(prepare, arguments))

    def submit(function: Callable[..., Any], *values: Any) -> Future[Any]:
        with _deferred_interrupts():
            return pool.submit(function, *values)

    try:
        yield submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Prepare a worker, which dies with its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    die_with_parent(parent.pid)

    def exit_with_parent() -> None:  # where the kernel does not do it
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


@contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block: in the middle of a start it would leave an orphan process.

    Processes started in the block have it blocked; their parent ends them.
    """
    received: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Blocked in this thread, it goes to another one, and still reaches the main thread's handler.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number)) if main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def progress_line(what: str, share: float) -> str:
    """One progress event, as a child process writes it to its standard output."""
    return json.dumps({"what": what, "share": round(share, 4)})


def parse_progress(line: str) -> tuple[str, float] | None:
    """The event of a line of ``progress_line``, or ``None`` for any other line."""
    try:
        event: Any = json.loads(line)
        return str(event["what"]), float(event["share"])
    except (ValueError, KeyError, TypeError):
        return None
