"""What of a matrix is finished in a run folder, what is still to run, and how long that should take."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeGuard

from tpme.bench.record import Cell, CellResult, Frozen, RecordError, Status, attempt_number, find_results, read_result
from tpme.bench.run.cell_checks import cost_key
from tpme.bench.run.job import Job
from tpme.bench.side_files import damage, has_digest
from tpme.bench.task.fingerprint import is_unchanged, sha256_of

FINISHED: frozenset[Status] = frozenset({"ok", "oom", "diverged", "timeout", "skipped"})
"""Statuses that another attempt would repeat; ``timeout`` only if the limit is not raised."""
_LARGE_BYTES = 2**24


class RowProgress(Frozen):
    """The cells of one row of a matrix, which differ in seed and learning rates alone."""

    cell: Cell
    """The first of them."""
    cells: int
    ended: dict[Status, int]
    """How many are finished, by how they ended."""
    missing_s: float | None
    """Expected time of the cells that are missing; ``None`` where no finished record here tells."""

    @property
    def missing(self) -> int:
        """Number of cells still to run."""
        return self.cells - sum(self.ended.values())


class Remaining(Frozen):
    """What of a matrix is finished, row by row."""

    rows: tuple[RowProgress, ...]

    @property
    def text(self) -> str:
        """One sentence: how many cells are finished, how many run, and how long that should take."""
        cells, missing = sum(row.cells for row in self.rows), sum(row.missing for row in self.rows)
        finished = f"{cells - missing} of {cells} {'cell' if cells == 1 else 'cells'} finished"
        if badly := ended_badly(self.rows):
            finished += f" ({badly})"
        if not missing:
            return f"{finished}, nothing to run."
        known = [row.missing_s for row in self.rows if row.missing and row.missing_s is not None]
        unknown = sum(row.missing for row in self.rows if row.missing_s is None)
        why = "there is no finished record of the same row here"
        if not known:
            return f"{finished}, {missing} to run; expected time not known: {why}."
        text = f"{finished}, {missing} to run; expected time {in_words(sum(known))}"
        return f"{text}, without {unknown} of them: {why}." if unknown else f"{text}."


def ended_badly(rows: Iterable[RowProgress]) -> str:
    """The finished cells that are not ``ok``, in words: ``1 oom, 2 diverged``; empty if there are none."""
    counts: Counter[Status] = Counter()
    for row in rows:
        counts.update(row.ended)
    return ", ".join(f"{number} {status}" for status, number in counts.items() if status != "ok")


def in_words(seconds: float) -> str:
    """A duration that is an estimate: ``under a second``, ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 1:
        return "under a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def remaining(jobs: Sequence[Job], latest: Sequence[CellResult | None], runs: Path) -> Remaining:
    """What of the cells of a whole matrix is finished.

    Args:
        jobs: of its cells. latest: record of each of them, if there is one.
        runs: folder of records. The expected time of a missing cell is the median wall time of those of the same row
            that ended well, with any seed and learning rate, on the same kind of device.
    """
    rows: dict[str, list[tuple[Job, CellResult | None]]] = {}
    for job, result in zip(jobs, latest, strict=True):
        rows.setdefault(_row(job.cell), []).append((job, result))
    ended = {key: [result.status for job, result in row if is_finished(result, job)] for key, row in rows.items()}
    complete = all(len(ended[key]) == len(row) for key, row in rows.items())
    times = {} if complete else _wall_times(runs)
    return Remaining(
        rows=tuple(_row_progress([job for job, _ in row], ended[key], times.get(key, ())) for key, row in rows.items())
    )


def _row_progress(jobs: Sequence[Job], ended: Sequence[Status], times: Sequence[float]) -> RowProgress:
    missing = len(jobs) - len(ended)
    expected = missing * median(times) if times else None
    return RowProgress(
        cell=jobs[0].cell, cells=len(jobs), ended=dict(Counter(ended)), missing_s=expected if missing else 0.0
    )


def _wall_times(runs: Path) -> dict[str, list[float]]:
    """Wall times of the records below ``runs`` that ended well, by row."""
    times: dict[str, list[float]] = {}
    for result in ended_well(runs):
        times.setdefault(_row(result.cell), []).append(result.wall_s)
    return times


def ended_well(runs: Path) -> Iterator[CellResult]:
    """The latest records below ``runs`` that ended as ``ok``, without those that cannot be read."""
    for path in find_results([runs]) if runs.exists() else ():
        with contextlib.suppress(RecordError):
            if (result := read_result(path)).status == "ok":
                yield result


def _row(cell: Cell) -> str:
    """Equal for cells that take as long as each other."""
    return f"{cell.device} {cell.training.epochs} {cost_key(cell)}"


class Latest(NamedTuple):
    """The latest attempt at a cell."""

    number: int
    """0 if there is none."""
    result: CellResult | None
    """Its record, if that can be used."""
    damage: str | None = None
    """Why it cannot be used: the record or a file beside it is damaged, or it is that of another cell."""


def latest_attempt(job: Job) -> Latest:
    """The latest attempt at the cell of ``job``, whose record and the files beside it are checked."""
    path = max(job.folder.glob("attempt-*.json"), key=attempt_number, default=Path())
    number = attempt_number(path)
    if not number:
        return Latest(0, None)
    try:
        result = read_result(path)
    except RecordError as error:
        return Latest(number, None, str(error))
    if result.cell_id != job.cell_id:
        return Latest(number, None, f"{path}: it is the record of another cell ({result.cell_id})")
    found = damage(path, result, is_recorded=partial(_is_recorded, job.store))
    return Latest(number, None if found else result, found)


def _is_recorded(store: Path, path: Path, digest: str) -> bool:
    """Whether a file has this SHA-256; of a large one, such as a saved adapter, the store remembers it."""
    if path.stat().st_size < _LARGE_BYTES:
        return has_digest(path, digest)
    return is_unchanged([path], digest, partial(sha256_of, path), store / "checked" / f"{digest[:16]}.json")


def is_finished(result: CellResult | None, job: Job) -> TypeGuard[CellResult]:
    """Whether another attempt at the cell of ``job``, whose latest record is ``result``, would end the same way."""
    if result is None:
        return False
    if result.status == "timeout" and result.time_limit_s is not None and job.time_limit_s > result.time_limit_s:
        return False
    if job.save_adapters and result.status == "ok" and "adapter" not in result.files:
        return False
    probed = result.representation.probe_items if result.representation else None
    if job.probe_items not in (None, probed) and result.status == "ok":
        return False
    return result.status in FINISHED
