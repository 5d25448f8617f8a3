"""Which of the ranks of a cell failed first, and what it left: the others fail because of it, in a collective.

The first rank that raises an error claims the failure by a file, before the others can notice, and leaves the record
of the attempt. Ranks of other nodes see the files, too: nodes share the folder of a cell.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tpme.bench.record import CellResult, RecordError, Status, read_result
from tpme.bench.run.job import Job
from tpme.bench.writing import write_atomically

if TYPE_CHECKING:
    from tpme.bench.run.rank_processes import RanksEnding

AFTER_ANOTHER = 3
"""Exit code of a rank that fails because another one has failed."""
OF_ALL: tuple[Status, ...] = ("diverged", "timeout")
"""Failures of a cell as a whole: the message names no rank."""


def _hidden(job: Job, name: str) -> Path:
    return job.folder / f".attempt-{job.attempt}.{name}"


def claim(job: Job, rank: int) -> Path | None:
    """Where ``rank``, which has failed, is to write the record of the attempt; ``None`` if another failed before it."""
    try:
        with _hidden(job, "failed").open("x") as file:
            file.write(str(rank))
    except FileExistsError:
        return None
    return _hidden(job, "failed.json")


def failed_elsewhere(job: Job) -> bool:
    """Whether any rank has failed, or the record of the attempt is there."""
    return any(path.exists() for path in (_hidden(job, "failed"), job.file(".json"), *notes(job)))


def leave_note(job: Job, ending: RanksEnding) -> None:
    """Tell the other nodes how the ranks of this one ended, if not well; too late once the record is there."""
    if not ending.well and not job.file(".json").exists():
        write_atomically(_hidden(job, f"lost-{min(ending.codes)}"), json.dumps(dict(ending.codes)).encode())


def notes(job: Job) -> list[Path]:
    """What nodes have said about how their ranks ended."""
    return list(job.folder.glob(f".attempt-{job.attempt}.lost-*"))


def blamed(job: Job, ending: RanksEnding) -> tuple[int, int]:
    """The rank that failed first, and its code.

    That is one that was ended by a signal from outside, else one that ended without a word, else the one that claimed
    the failure: a rank that loses another one in a collective says so, with an error of its own.
    """
    codes = {**ending.codes, **_codes_elsewhere(job)}
    bad = [(rank, code) for rank, code in sorted(codes.items()) if code]
    signals = [(rank, code) for rank, code in bad if code < 0 and not _follows(job, code)]
    claimed = _claimed(job)
    silent = [(rank, code) for rank, code in bad if code > 0 and code != AFTER_ANOTHER and rank != claimed]
    said = [] if claimed is None else [(claimed, codes.get(claimed) or 1)]
    return next(iter((*signals, *silent, *said, *bad)), (0, 0))


def _follows(job: Job, code: int) -> bool:
    """Whether a signal may follow from the loss of another rank: NCCL then aborts the process."""
    return code == -signal.SIGABRT and job.cell.device == "cuda"


def left_record(job: Job, ending: RanksEnding) -> CellResult | None:
    """The record that the first failing rank left, its message with the rank; ``None`` where a rank was just lost."""
    rank, _ = blamed(job, ending)
    if rank != _claimed(job) and not ending.timed_out:
        return None
    try:
        result = read_result(_hidden(job, "failed.json"))
    except (OSError, RecordError):
        return None
    if (ending.timed_out and result.status != "timeout") or result.failure is None:
        return None
    if result.status in OF_ALL:
        return result
    message = f"{in_words(job, rank)}: {result.failure.message} (log: {job.log(rank).name})"
    return result.model_copy(update={"failure": result.failure.model_copy(update={"message": message})})


def in_words(job: Job, rank: int) -> str:
    """``rank 1 of 2``."""
    return f"rank {rank} of {job.cell.training.devices}"


def _claimed(job: Job) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(_hidden(job, "failed").read_text())
    return None


def _codes_elsewhere(job: Job) -> Mapping[int, int]:
    """Codes of ranks of other nodes that ended badly."""
    codes: dict[int, int] = {}
    for path in notes(job):
        with contextlib.suppress(OSError, ValueError):
            codes |= {int(rank): code for rank, code in json.loads(path.read_bytes()).items() if code}
    return codes
