"""Decodes all item images of a data set into one array on disk, on all cores and in bounded memory.

Worker processes write their rows straight into the file, so no pixels pass through a pipe, and only a few batches are
in progress at a time.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

import numpy as np

from tpme.bench.errors import UserError
from tpme.bench.task.sources.raw import Picture
from tpme.bench.workers import available_cores, worker_processes

BATCH = 32
"""Pictures per batch of a worker."""

Failure = tuple[int, str]
"""Index of an unreadable picture, and the error."""

Batch = tuple[int, Sequence[Picture]]
"""Index of the first picture, and the pictures."""

Result = tuple[int, list[Failure]]
"""Number of pictures in a batch, and those that could not be read."""


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
        workers: number of processes; by default one per core. A few pictures are decoded in this process.
        skip_bad: continue after an unreadable picture and leave its row zero.
        advance: called with the number of pictures written since the last call, in order.

    Returns:
        The unreadable pictures (with ``skip_bad``).

    Raises:
        UserError: a picture cannot be read (without ``skip_bad``), a worker died, or the disk is too small.
    """
    shape = (len(pictures) + 1, 3, size, size)
    require_space(path.parent, int(np.prod(shape)))
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    batches = [(start, pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    failures: list[Failure] = []
    count = min(workers or available_cores(), len(batches) // 2)
    with closing(_results(path, size, batches, count)) as results:
        for written, failed in results:
            advance(written)
            failures += failed
            if failed and not skip_bad:
                raise UserError(f"{failed[0][1]}; replace it, or skip such items with --skip-bad")
    return failures


def _write_rows(path: Path, size: int, start: int, pictures: Sequence[Picture]) -> Result:
    """Decode one batch into its rows of the file; runs in a worker."""
    rows, failures = np.zeros((len(pictures), 3, size, size), np.uint8), []
    for index, picture in enumerate(pictures):
        try:
            rows[index] = picture(size)
        except UserError as error:
            failures.append((start + index, str(error)))
    before = np.load(path, mmap_mode="r").offset + (start + 1) * rows[0].nbytes
    try:
        with path.open("r+b") as file:  # not through a memory map, which would fault on every page
            file.seek(before)
            file.write(rows.data)
    except OSError as error:  # add the path, which the error of a full disk lacks
        raise OSError(error.errno, error.strerror, str(path)) from None
    return len(pictures), failures


def _results(path: Path, size: int, batches: Sequence[Batch], count: int) -> Generator[Result, None, None]:
    """Yield the results in order. Enough batches are queued that no worker idles behind a slow one."""
    if count <= 1:
        yield from (_write_rows(path, size, start, pictures) for start, pictures in batches)
        return
    waiting: deque[Future[Result]] = deque()
    try:
        with worker_processes(count) as submit:
            for start, pictures in batches:
                waiting.append(submit(_write_rows, path, size, start, pictures))
                if len(waiting) == 4 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a process that decodes images died (out of memory?); try again with --workers 1") from None


def require_space(folder: Path, needed: int) -> None:
    """Check the disk space first: the image file is sparse, so a full disk would only show after hours."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: the images need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
