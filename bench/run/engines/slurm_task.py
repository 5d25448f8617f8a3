"""What a task of a job array does on its node: run attempts as a launcher there would, or build a feature cache.

It is pickled by submitit, hence as small as it is. A task that the scheduler stops leaves no record; requeued, it runs
the same attempts again, of which those that ended are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpme.bench.run.attempt import run_job, run_on_nodes
from tpme.bench.run.job import Job

if TYPE_CHECKING:
    from tpme.bench.task.features import FeatureJob

THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class SlurmTask:
    """Work of a task: called on each of its nodes, with one element of the array."""

    cpus: int
    """Cores that Slurm gives it on a node; not every cluster binds its processes to them."""
    nodes: int = 1

    def variables(self) -> dict[str, str]:
        """Further environment variables of its processes."""
        return {} if THREADS in os.environ else {THREADS: str(self.cpus)}

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit requeues when the time of the job is up, or it is preempted."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


class RunCells(SlurmTask):
    """Runs attempts, one after the other."""

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Run those that have not left a record; on several nodes, each of which calls this, together."""
        for job in jobs:
            if job.file(".json").exists():
                continue
            if self.nodes == 1:
                run_job(job, variables=self.variables())
            else:
                meeting = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
                run_on_nodes(job, int(os.environ["SLURM_NODEID"]), self.nodes, meeting, self.variables())


class BuildCaches(SlurmTask):
    """Builds a feature cache, with all that several cells need of it."""

    def __call__(self, jobs: Sequence[FeatureJob]) -> None:
        """Build what is missing. Raises UserError where that is not possible."""
        from tpme.bench.train.cached import build_cache

        os.environ.update(self.variables())
        for job in jobs:
            build_cache(job, lambda _what, _share: None)
