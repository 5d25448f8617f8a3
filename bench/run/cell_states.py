"""How the cells of a run folder are doing right now, by their records, their launcher's lock and Slurm."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tpme.bench.errors import UserError
from tpme.bench.parsing import read_json
from tpme.bench.record import CELLS_FILE, RecordError, attempt_number, read_result
from tpme.bench.run.engines.slurm_jobs import is_cancelled, read_jobs
from tpme.bench.run.engines.slurm_queue import RUNNING, SlurmJobState, queue
from tpme.bench.run.remaining import FINISHED

State = Literal["finished", "running", "waiting", "failed", "not started"]
STATES: tuple[State, ...] = get_args(State)


class CellState(NamedTuple):
    """How one cell is doing."""

    folder: str
    state: State
    detail: str
    """How it ended, the node on which it runs, or what it waits for."""


def cell_states(run: Path) -> list[CellState]:
    """The cells of the last matrix of a run folder, in its order.

    Raises UserError where it is no run folder, and where it has jobs in Slurm that cannot be asked.
    """
    try:
        names = [str(name) for name in read_json(run / CELLS_FILE)["cells"]]
    except FileNotFoundError:
        raise UserError(f"{run}: no run folder of 'tpme run' ({CELLS_FILE} is missing)") from None
    except (KeyError, TypeError):
        raise UserError(f"{run / CELLS_FILE}: not readable; delete it, or run the matrix again") from None
    in_slurm, launched = dict(_in_slurm(run)), _has_launcher(run)
    return [_state_of(run / "cells" / name, in_slurm.get(name), launched) for name in names]


def counts(states: Sequence[CellState]) -> list[tuple[State, int, str]]:
    """How many cells are in each state, and what is to be said of them: ``ok 78, oom 2``."""
    rows = []
    for state in STATES:
        details = Counter(cell.detail for cell in states if cell.state == state)
        words = ", ".join(f"{detail} {number}" for detail, number in details.most_common() if detail)
        rows.append((state, details.total(), words))
    return rows


def _state_of(folder: Path, slurm: tuple[int, State, str] | None, launched: bool) -> CellState:
    number, status = _latest(folder)
    if status in FINISHED:
        return CellState(folder.name, "finished", status)
    if slurm is not None and slurm[0] > number:
        return CellState(folder.name, slurm[1], slurm[2])
    if launched and list(folder.glob("attempt-*.job.json")):
        return CellState(folder.name, "running", "this machine")
    if status:
        return CellState(folder.name, "failed", status)
    return CellState(folder.name, "waiting" if launched else "not started", "")


def _latest(folder: Path) -> tuple[int, str]:
    """Number and status of the latest attempt with a record; ``damaged`` is one that cannot be read."""
    path = max(folder.glob("attempt-*.json"), key=attempt_number, default=Path())
    if not attempt_number(path):
        return 0, ""
    try:
        return attempt_number(path), read_result(path).status
    except RecordError:
        return attempt_number(path), "damaged"


def _in_slurm(run: Path) -> Iterator[tuple[str, tuple[int, State, str]]]:
    """Of the cells that were given to Slurm: the attempt, and how its job is doing."""
    file = read_jobs(run)
    if file is None or not file.submissions or is_cancelled(run):
        return
    jobs, busy = queue(file.prefix), set[str]()
    for attempt, task in file.where().items():
        ended = (run / "cells" / attempt.folder / f"attempt-{attempt.attempt}.json").exists()
        state, detail = _of_job(jobs.get(task))
        if state == "running" and not ended and task in busy:
            state, detail = "waiting", "another seed"
        elif not ended:
            busy.add(task)
        yield attempt.folder, (attempt.attempt, state, detail)


def _of_job(job: SlurmJobState | None) -> tuple[State, str]:
    if job is None or job.ended:
        return "waiting", "its job has ended: run the same command"
    if job.state in RUNNING:
        return "running", job.node
    return "waiting", job.reason if job.reason not in ("", "None") else job.state


def _has_launcher(run: Path) -> bool:
    """Whether a ``tpme run`` of this machine uses a run folder now."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError):
        lock = os.open(run / ".lock", os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
    return False
