"""The file of a run folder that says which of its attempts were given to Slurm, as which jobs.

It is written before and after every submission, so that a launcher that was killed in between submits nothing twice:
what it was about to submit has a name of its own, by which the next launcher finds it in the queue.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from tpme.bench.errors import UserError
from tpme.bench.record import Frozen
from tpme.bench.run.engines.slurm_queue import SlurmJobState, cancel, queue
from tpme.bench.run.job import Job
from tpme.bench.writing import make_folder, write_atomically

FOLDER = "slurm"
"""In a run folder: jobs.json, and the files of submitit."""
_PATIENCE_S = 120.0
"""Longest wait for jobs to end that were cancelled: Slurm gives them KillWait, 30 s by default."""


class Attempt(Frozen):
    """One attempt at one cell."""

    folder: str
    """Name of the cell's folder."""
    attempt: int

    @classmethod
    def of(cls, job: Job) -> Attempt:
        """The attempt of a job."""
        return cls(folder=job.folder.name, attempt=job.attempt)


class Submission(Frozen):
    """One job array, or one job."""

    name: str
    job: str | None = None
    """Slurm's number; ``None`` while it is being submitted."""
    tasks: tuple[tuple[Attempt, ...], ...] = ()
    """The attempts of each task, one after the other."""
    caches: tuple[str, ...] = ()
    """In place of attempts: the feature caches that the tasks build, by the names of their folders."""

    @property
    def ids(self) -> list[str]:
        """Slurm's ids of the tasks, as ``squeue`` writes them; none while it is being submitted."""
        number = len(self.tasks or self.caches)
        if self.job is None:
            return []
        return [self.job] if number == 1 else [f"{self.job}_{task}" for task in range(number)]

    def where(self) -> dict[Attempt, str]:
        """The id of the task of each attempt."""
        return {attempt: task for task, attempts in zip(self.ids, self.tasks, strict=False) for attempt in attempts}


class SlurmJobs(Frozen):
    """What a run folder has in Slurm."""

    version: int = 1
    prefix: str
    """Of the names of its jobs."""
    submissions: tuple[Submission, ...] = ()

    def where(self) -> dict[Attempt, str]:
        """The id of the task of each attempt, of several submissions the last."""
        return {attempt: task for submission in self.submissions for attempt, task in submission.where().items()}

    def tries(self, attempt: Attempt) -> int:
        """How often an attempt was submitted."""
        return sum(attempt in task for submission in self.submissions for task in submission.tasks)

    def new_name(self) -> str:
        """A name for a further submission."""
        return f"{self.prefix}{secrets.token_hex(4)}"


def jobs_folder(run: Path) -> Path:
    """The folder of a run folder's Slurm jobs."""
    return run / FOLDER


def read_jobs(run: Path) -> SlurmJobs | None:
    """What a run folder has in Slurm; ``None`` for nothing. Raises UserError for a damaged file."""
    path = jobs_folder(run) / "jobs.json"
    try:
        return SlurmJobs.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise UserError(f"{path}: damaged; see 'squeue' for jobs named tpme-..., cancel them and delete it") from None


def no_jobs(run: Path) -> SlurmJobs:
    """The file of a run folder that has nothing in Slurm."""
    return SlurmJobs(prefix=f"tpme-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:10]}-")


def write_jobs(run: Path, jobs: SlurmJobs) -> None:
    """Write the file of a run folder."""
    make_folder(jobs_folder(run))
    write_atomically(jobs_folder(run) / "jobs.json", (jobs.model_dump_json(indent=1) + "\n").encode())


# --- cancelling ---------------------------------------------------------------------------------------------------


def _cancelled_mark(run: Path) -> Path:
    return jobs_folder(run) / "cancelled"


def is_cancelled(run: Path) -> bool:
    """Whether ``tpme cancel`` was called on a run folder since its jobs were submitted."""
    return _cancelled_mark(run).exists()


def cancel_run(run: Path, jobs: SlurmJobs) -> int:
    """Cancel what a run folder has in Slurm and wait for its end; returns how many jobs that were.

    A launcher that is attached ends, too, for it finds the mark. Raises SlurmError where Slurm refuses or does not end
    the jobs.
    """
    write_atomically(_cancelled_mark(run), b"")
    return end_jobs(jobs.prefix)


def end_jobs(prefix: str) -> int:
    """Cancel the jobs whose names begin with ``prefix`` and wait for their end; returns how many there were."""
    until_s, ids = time.monotonic() + _PATIENCE_S, set[str]()
    while left := active(queue(prefix).values()):
        ids |= {state.job for state in left}
        if time.monotonic() > until_s:
            raise UserError(f"Slurm has not ended {len(left)} cancelled jobs within {_PATIENCE_S:g} s; see 'squeue'")
        cancel(state.job for state in left)
        time.sleep(0.5)
    return len(ids)


def active(states: Iterable[SlurmJobState]) -> list[SlurmJobState]:
    """The jobs of which something may still come."""
    return [state for state in states if not state.ended]


def forget_jobs(run: Path) -> None:
    """Remove the file of a run folder, and what else Slurm's jobs left there."""
    shutil.rmtree(jobs_folder(run), ignore_errors=True)


def refuse_jobs_in_slurm(run: Path) -> None:
    """Raise UserError where a run folder has jobs in Slurm: another engine would run the same cells."""
    if is_cancelled(run):
        forget_jobs(run)
    elif (jobs := read_jobs(run)) is not None and jobs.submissions:
        raise UserError(
            f"{run}: it has jobs in Slurm; 'tpme run ... --on slurm' attaches to them, 'tpme cancel {run}' ends them"
        )
