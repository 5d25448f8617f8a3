"""Worker processes beside this one: Ctrl-C reaches this process alone, and they do not outlive it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

Submit = Callable[..., Future[Any]]
"""``submit(function, *arguments)``: call a function of a module in a worker."""


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_processes(
    count: int, prepare: Callable[..., None] | None = None, *arguments: Any, fork: bool = False
) -> Iterator[Submit]:
    """At most ``count`` processes, started as they are needed; what nobody waits for any more is cancelled at the end.

    Args:
        count: of processes.
        prepare: called with ``arguments`` in every process before its first work.
        fork: processes have what this one has, at once, where otherwise each loads its modules and unpickles its
            ``arguments``; allowed only while no other thread of this process may hold a lock that they need.
    """
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(prepare, arguments))

    def submit(function: Callable[..., Any], *given: Any) -> Future[Any]:
        with _interrupts_held():
            return pool.submit(function, *given)

    try:
        yield submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Do not outlive the parent if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A Ctrl-C in here is heard at the end: in the middle of a start it would leave a process that nobody ends.

    Processes started in here are born with it blocked: it is the parent that ends them then.
    """
    came: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Blocked in this thread, it goes to another one, and is heard in the main thread all the same.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number)) if main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler)
        if came:
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
