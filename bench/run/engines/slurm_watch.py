"""Gives attempts to Slurm and waits for their records, whatever becomes of the jobs meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tpme.bench.errors import UserError
from tpme.bench.limits import resolved
from tpme.bench.owner_lock import on_network
from tpme.bench.record import CellResult, RecordError, read_result
from tpme.bench.run.attempt import lost_result, write_lost
from tpme.bench.run.cell_checks import MetaCells
from tpme.bench.run.engines.slurm_jobs import (
    Attempt,
    SlurmJobs,
    Submission,
    active,
    end_jobs,
    forget_jobs,
    is_cancelled,
    jobs_folder,
    no_jobs,
    read_jobs,
    write_jobs,
)
from tpme.bench.run.engines.slurm_queue import RUNNING, SlurmJobState, queue, why_ended
from tpme.bench.run.engines.slurm_submit import Submitter
from tpme.bench.run.engines.slurm_task import BuildCaches, RunCells, SlurmTask
from tpme.bench.run.job import Job
from tpme.bench.run.progress import Screen
from tpme.bench.slurm_commands import SlurmError
from tpme.bench.task.features import FeatureJob

AGAIN = frozenset({"BOOT_FAIL", "NODE_FAIL", "PREEMPTED"})
"""Ends that are not the cell's: it is submitted again, as one whose job Slurm has forgotten is."""
MOST_TRIES = 4
"""Submissions of one attempt."""
POLL_S, SLOWEST_POLL_S = 1.0, 15.0
"""Time between two questions to Slurm, at first and after a quarter of an hour."""
RECORD_PATIENCE_S, NETWORK_PATIENCE_S = 5.0, 90.0
"""Wait for the record of a job that has ended; a network file system may show a new file a minute later (NFS's
``acdirmax``)."""
LAST_WORDS_S = 10.0
"""Wait for the end of jobs whose cells have ended."""


class SlurmWatch:
    """The attempts that have not ended, and what Slurm does with them.

    Args:
        submitter: submits. run: the run folder. attempts: to be run, or being run. screen: shows counts.
    """

    def __init__(self, submitter: Submitter, run: Path, attempts: Sequence[Job], screen: Screen) -> None:
        self.submitter, self.run, self.screen = submitter, run, screen
        self.open = {Attempt.of(job): job for job in attempts}
        self.started = time.monotonic()
        self.file = self._found()
        self.states = queue(self.file.prefix)
        there = self.file.where()
        self.waiting = [job for attempt, job in self.open.items() if attempt not in there]
        """What is still to be submitted."""
        self.needs = self._missing_caches()
        self.gone: dict[str, float] = {}
        """When a task was first seen to have ended."""
        self.patience_s = NETWORK_PATIENCE_S if on_network(run) else RECORD_PATIENCE_S
        self.most_tasks = submitter.most_tasks
        self.refused = self.silent = self.lost = False
        if known := len(self.open) - len(self.waiting):
            screen.print(f"{known} {'cell was' if known == 1 else 'cells were'} given to Slurm before; attached.")

    def _found(self) -> SlurmJobs:
        """What the last launcher left in Slurm."""
        file = read_jobs(self.run) or no_jobs(self.run)
        if is_cancelled(self.run):
            end_jobs(file.prefix)
            forget_jobs(self.run)
            return no_jobs(self.run)
        return file

    def until_all_ended(self, caught: list[int]) -> Iterator[tuple[Job, CellResult]]:
        """Submit and wait; yields every attempt with its record as it ends, until a signal comes."""
        while self.open and not caught:
            self._stop_if_cancelled()
            self._submit()
            self._stop_if_cancelled()
            if self._ask():
                yield from self._ended()
            self._drop_ended()
            self.screen.state(self._counts())
            self._sleep(caught)
        if not self.open:
            self._finish()

    def _finish(self) -> None:
        """Remove what Slurm's jobs left in the run folder, once they have ended; the logs of those that failed stay."""
        until_s = time.monotonic() + LAST_WORDS_S
        while self.file.submissions and time.monotonic() < until_s:
            time.sleep(POLL_S / 2)
            if self._ask():
                self._drop_ended()
        if not self.file.submissions and not self.lost:
            forget_jobs(self.run)

    def _stop_if_cancelled(self) -> None:
        if is_cancelled(self.run):
            end_jobs(self.file.prefix)
            raise UserError(
                f"{self.run}: cancelled by 'tpme cancel'; {len(self.open)} cells are not finished, and the same "
                "command runs them"
            )

    def _end_cut(self) -> None:
        """End submissions of which nothing but the intention is known: sbatch or a launcher was killed, or timed out.

        Slurm may have their jobs all the same, perhaps without the files that they need.
        """
        cut = [submission for submission in self.file.submissions if submission.job is None]
        for submission in cut:
            end_jobs(submission.name)
        self._write(tuple(submission for submission in self.file.submissions if submission not in cut))

    # --- submitting ---------------------------------------------------------------------------------------------------

    def _missing_caches(self) -> dict[Attempt, dict[str, FeatureJob]]:
        """The feature caches that attempts still to be submitted need, by the names of their folders."""
        cached = [job for job in self.waiting if job.cell.cached]
        if not cached:
            return {}
        from tpme.bench.counting.batch import DataShape
        from tpme.bench.run.preflight import missing_caches
        from tpme.bench.task.dataset import Dataset

        metas, needs = MetaCells(cached[0].methods_path), {}
        shapes = {path: DataShape.of(Dataset.open(path)) for path in {job.dataset_path for job in cached}}
        for job in cached:
            with contextlib.suppress(Exception):  # of a method that needs values: its cells build what they need
                caches = missing_caches(job, metas.build(job.cell, shapes[job.dataset_path]))
                needs[Attempt.of(job)] = {folder.name: cache for folder, cache in caches.items()}
        return needs

    def _submit(self) -> None:
        """Submit what waits, as far as Slurm takes it now."""
        if not self.waiting:
            return
        try:
            self._end_cut()
            self._submit_builders()
            groups: dict[tuple[str, ...], list[tuple[Job, ...]]] = {}
            for task in self.submitter.tasks(self.waiting):
                groups.setdefault(self._after(task), []).append(task)
            for after, tasks in groups.items():
                while tasks:
                    chunk = tasks[: self.most_tasks]
                    self._submit_cells(chunk, after)
                    del tasks[: len(chunk)]
                    self.most_tasks = min(2 * self.most_tasks, self.submitter.most_tasks)
        except SlurmError as error:
            self._refused(error)
        else:
            self.refused = False

    def _refused(self, error: SlurmError) -> None:
        """Submit less next time; raises the error where Slurm has nothing of this run that could end before."""
        if self.most_tasks > 1:
            self.most_tasks = max(1, min(self.most_tasks, len(self.waiting)) // 2)
            return
        if len(self.waiting) == len(self.open):
            end_jobs(self.file.prefix)
            forget_jobs(self.run)
            raise error
        if not self.refused:
            self.refused = True
            self.screen.print(f"Slurm takes no more now ({error}); {len(self.waiting)} cells wait until others end.")

    def _submit_builders(self) -> None:
        """Submit the builders of caches that nobody builds yet, all that cells need of a cache in one task."""
        wanted: dict[str, list[FeatureJob]] = {}
        for job in self.waiting:
            for folder, cache in self.needs.get(Attempt.of(job), {}).items():
                if cache.initial not in [other.initial for other in wanted.setdefault(folder, [])]:
                    wanted[folder].append(cache)
        asked = {folder for submission in self.file.submissions for folder in submission.caches}
        missing = {folder: caches for folder, caches in wanted.items() if folder not in asked}
        if missing:
            limit_s = max(self.submitter.time_s([job]) for job in self.waiting)
            submission = Submission(name=self.file.new_name(), caches=tuple(missing))
            self._submit_one(submission, BuildCaches(self.submitter.profile.cpus), list(missing.values()), limit_s)
            self.states |= queue(self.file.prefix)

    def _after(self, task: Sequence[Job]) -> tuple[str, ...]:
        """The ids of the builders that a task waits for."""
        folders = {folder for job in task for folder in self.needs.get(Attempt.of(job), {})}
        building = {
            folder: job
            for submission in self.file.submissions
            for folder, job in zip(submission.caches, submission.ids, strict=False)
            if job in self.states and not self.states[job].ended
        }
        return tuple(sorted(building[folder] for folder in folders & building.keys()))

    def _submit_cells(self, tasks: Sequence[tuple[Job, ...]], after: Sequence[str]) -> None:
        attempts = tuple(tuple(map(Attempt.of, task)) for task in tasks)
        # A container or another working directory must not matter.
        on_nodes = [tuple(job.model_copy(update={"folder": resolved(job.folder)}) for job in task) for task in tasks]
        limit_s = max(map(self.submitter.time_s, tasks))
        submission = Submission(name=self.file.new_name(), tasks=attempts)
        profile = self.submitter.profile
        self._submit_one(submission, RunCells(profile.cpus, profile.nodes), on_nodes, limit_s, after)
        given = {attempt for task in attempts for attempt in task}
        self.waiting = [job for job in self.waiting if Attempt.of(job) not in given]

    def _submit_one(
        self,
        submission: Submission,
        work: SlurmTask,
        tasks: Sequence[object],
        limit_s: float,
        after: Sequence[str] = (),
    ) -> None:
        """Submit; the intention is on disk before, the number after. Raises SlurmError, and leaves the intention."""
        before = self.file.submissions
        self._write((*before, submission))
        number = self.submitter.submit(self.run, submission.name, work, tasks, limit_s, after)
        self._write((*before, submission.model_copy(update={"job": number})))

    def _write(self, submissions: tuple[Submission, ...]) -> None:
        if submissions != self.file.submissions:
            self.file = self.file.model_copy(update={"submissions": submissions})
            write_jobs(self.run, self.file)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _ask(self) -> bool:
        """Ask Slurm how the jobs are doing; returns whether it answered."""
        try:
            self.states = queue(self.file.prefix)
        except SlurmError as error:
            if not self.silent:
                self.screen.print(f"{error}; asked again until it answers.")
            self.silent = True
            return False
        self.silent = False
        return True

    def _ended(self) -> Iterator[tuple[Job, CellResult]]:
        """The attempts that have ended, with their records; those whose job left none are submitted again, or fail."""
        without: dict[str, list[Job]] = {}
        waiting = set(map(Attempt.of, self.waiting))
        for attempt, task in self.file.where().items():
            job = self.open.get(attempt)
            if job is None or attempt in waiting:
                continue
            if (result := _record(job)) is not None:
                yield self._close(job, result)
            elif self._is_gone(task):
                without.setdefault(task, []).append(job)
        for task, jobs in without.items():
            state = self.states.get(task)
            cancelled = state is not None and state.state == "CANCELLED"
            for place, job in enumerate(jobs):
                tries = self.file.tries(Attempt.of(job))
                # Of several seeds one was running, and the others were not begun.
                again = state is None or state.state in AGAIN or (place > 0 and not cancelled)
                if again and tries < MOST_TRIES:
                    self.waiting.append(job)
                else:
                    yield self._close(job, self._write_lost(job, task, state, tries))

    def _is_gone(self, task: str) -> bool:
        """Whether a task has ended for good: for some seconds, in which it left no record."""
        state = self.states.get(task)
        if state is not None and not state.ended:
            self.gone.pop(task, None)
            return False
        return time.monotonic() - self.gone.setdefault(task, time.monotonic()) >= self.patience_s

    def _close(self, job: Job, result: CellResult) -> tuple[Job, CellResult]:
        del self.open[Attempt.of(job)]
        return job, result

    def _write_lost(self, job: Job, task: str, state: SlurmJobState | None, tries: int) -> CellResult:
        """Write the record of an attempt whose job left none."""
        self.lost = True
        log = next(iter(sorted(jobs_folder(self.run).glob(f"{task}_*log.err"))), None)
        where = f"log: {log}" if log else f"without a log: do the nodes see {self.run}?"
        often = f", after {tries} tries" if tries > 1 else ""
        message = f"its Slurm job {task} ended {why_ended(state)}{often}, and left no record ({where})"
        result = lost_result(job, "killed", message, state.elapsed_s if state else 0.0, datetime.now(UTC))
        write_lost(job, result)
        return result

    def _drop_ended(self) -> None:
        """Forget submissions of which nothing more can come."""
        left = {state.job for state in active(self.states.values())}
        self._write(
            tuple(
                submission
                for submission in self.file.submissions
                if left.intersection(submission.ids)
                or any(attempt in self.open for task in submission.tasks for attempt in task)
                or (submission.caches and self.waiting)
            )
        )

    def _counts(self) -> str:
        """How many cells run, and how many wait for what."""
        where = self.file.where()
        states = [self.states.get(task) for task in {where[attempt] for attempt in self.open if attempt in where}]
        running = [state for state in states if state is not None and state.state in RUNNING]
        reasons = Counter(state.reason for state in states if state is not None and state.state == "PENDING")
        nodes = len({state.node for state in running})
        text = f"{len(running)} running" + (f" on {nodes} nodes" if nodes > 1 else "")
        text += f", {len(self.open) - len(running)} waiting"
        commonest = [reason for reason, _ in reasons.most_common(1) if reason not in ("", "None")]
        return f"{text} ({commonest[0]})" if commonest else text

    def _sleep(self, caught: list[int]) -> None:
        now = time.monotonic()
        until_s = now + min(SLOWEST_POLL_S, POLL_S + (now - self.started) / 60)
        while self.open and not caught and time.monotonic() < until_s:
            time.sleep(0.1)


def _record(job: Job) -> CellResult | None:
    """The record of an attempt; ``None`` where there is none, or it cannot be read yet."""
    path = job.file(".json")
    try:
        return read_result(path) if path.exists() else None
    except RecordError:
        return None
