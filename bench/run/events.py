"""The standard output of a cell's process carries progress events alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tpme.bench.workers import progress_line

EVERY_S = 0.2
"""Shortest time between two events, unless the second ends a part."""


@contextmanager
def progress_events() -> Iterator[Callable[[str, float], None]]:
    """A function that writes events; what libraries print goes to standard error, the cell's log, meanwhile."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    last = 0.0

    def progress(what: str, share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > EVERY_S or share >= 1:
            last = now
            try:
                events.write(progress_line(what, share) + "\n")
            except BrokenPipeError:
                os._exit(1)  # the launcher is gone: end without a record

    with events:
        yield progress


@contextmanager
def telling(progress: Callable[[str, float], None]) -> Iterator[None]:
    """Report an error of the file system as the last event, too: on a full disk the log cannot hold it."""
    try:
        yield
    except OSError as error:
        progress(f"{error.filename or 'a file'}: {error.strerror or error}", 1.0)
        raise
