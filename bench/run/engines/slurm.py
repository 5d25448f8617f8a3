"""Cells as tasks of Slurm's job arrays, on nodes that share their folders with this machine.

submitit writes the batch scripts, pickles what a task does, submits arrays, and on a node catches the signals of
preemption and of the end of a job's time, upon which the job is queued again. It falls short where a cluster keeps no
accounting: it learns how a job ended from ``sacct`` alone, so it would wait for ever for one that was cancelled. How
jobs are doing is therefore asked of ``squeue`` and ``scontrol``, and what became of a cell is what its record says.

A task runs attempts by the same code as a launcher on its node would. Jobs outlive this process: it may be stopped and
started again, and finds them by the file of ``tpme.bench.run.engines.slurm_jobs``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tpme.bench.record import CellResult
from tpme.bench.run.engines.profile import RunProfile
from tpme.bench.run.engines.slurm_submit import Submitter
from tpme.bench.run.engines.slurm_watch import SlurmWatch
from tpme.bench.run.job import Job
from tpme.bench.run.process import deferred_signals, raise_signal
from tpme.bench.run.progress import Screen


class SlurmEngine:
    """Runs cells as tasks of job arrays; arguments and errors are those of ``Submitter``."""

    here, shared = False, True

    def __init__(self, profile: RunProfile, same_node: bool = False) -> None:
        self.submitter = Submitter(profile, same_node)

    def check(self, attempts: Sequence[Job]) -> None:
        """See ``Engine.check``."""
        self.submitter.check(attempts, _run_folder(attempts))

    def run(self, attempts: Sequence[Job], screen: Screen, lock: int) -> Iterator[tuple[Job, CellResult]]:
        """See ``Engine.run``. Signals end this process and leave the jobs running."""
        run = _run_folder(attempts)
        with deferred_signals() as caught:
            watch = SlurmWatch(self.submitter, run, attempts, screen)
            yield from watch.until_all_ended(caught)
        if caught:
            left = len(watch.open)
            screen.print(
                f"{left} {'cell goes' if left == 1 else 'cells go'} on in Slurm: the same command attaches again, "
                f"'tpme status {run}' shows them, 'tpme cancel {run}' ends them."
            )
            raise_signal(caught[0])


def _run_folder(attempts: Sequence[Job]) -> Path:
    return attempts[0].folder.parent.parent
