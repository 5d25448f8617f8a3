"""Decoding all item images of a data set into one array on the disk, on all cores and in bounded memory.

Worker processes write their rows straight into the memory-mapped file, so no pixel passes through a pipe, and only a
few batches are under way at any time.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from tpme.bench.errors import UserError
from tpme.bench.task.raw import Picture

BATCH = 32
"""Pictures a worker gets at a time."""

Failure = tuple[int, str]
"""Index of a picture and why it could not be read."""

Batch = tuple[int, Sequence[Picture]]
"""Index of the first picture, and the pictures."""

Result = tuple[int, list[Failure]]
"""How many pictures a batch had, and which could not be read."""


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_all(
    pictures: Sequence[Picture],
    path: Path,
    size: int,
    *,
    workers: int | None = None,
    skip_bad: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Failure]:
    """Write ``pictures`` as ``.npy`` of uint8 (n + 1, 3, size, size): picture i in row i + 1, zeros in row 0.

    Args:
        workers: processes; by default one a core. Few pictures are decoded in this process.
        skip_bad: go on after a picture that cannot be read, and leave its row zero.
        advance: called with the number of pictures done since the last call.

    Returns:
        The pictures that could not be read, by index (with ``skip_bad``).

    Raises:
        UserError: a picture cannot be read (without ``skip_bad``), a worker died, or the disk is too small.
    """
    shape = (len(pictures) + 1, 3, size, size)
    _require_space(path.parent, int(np.prod(shape)))
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    batches = [(start, pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    failures: list[Failure] = []
    workers = min(workers or available_cores(), len(batches) // 2)
    in_pool = workers > 1
    with closing(_in_pool(path, size, batches, workers) if in_pool else _in_turn(path, size, batches)) as results:
        for count, failed in results:
            advance(count)
            failures += failed
            if failed and not skip_bad:
                raise UserError(f"{min(failed)[1]}; replace it, or leave such items out with --skip-bad")
    return sorted(failures)


def _write_rows(path: Path, size: int, start: int, pictures: Sequence[Picture]) -> Result:
    """Decode one batch into its rows. Runs in a worker."""
    rows = np.load(path, mmap_mode="r+")
    failures = []
    for index, picture in enumerate(pictures, start=start):
        try:
            rows[index + 1] = picture(size)
        except UserError as error:
            failures.append((index, str(error)))
    return len(pictures), failures


def _in_turn(path: Path, size: int, batches: Sequence[Batch]) -> Generator[Result, None, None]:
    for start, pictures in batches:
        yield _write_rows(path, size, start, pictures)


def _in_pool(path: Path, size: int, batches: Sequence[Batch], workers: int) -> Generator[Result, None, None]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks (progress bar) as they are
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting: set[Future[Result]] = set()
    try:
        for start, pictures in batches:
            with _interrupts_held():
                waiting.add(pool.submit(_write_rows, path, size, start, pictures))
            if len(waiting) >= 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise UserError("a process that decodes images died (out of memory?); try again with --workers 1") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Do not outlive the parent if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started in here are born with Ctrl-C blocked: it is the parent that ends the pool then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _require_space(folder: Path, needed: int) -> None:
    # Checked beforehand, because a memory-mapped file that meets a full disk ends the process with SIGBUS.
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: the images need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
