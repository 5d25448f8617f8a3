"""Submits job arrays through submitit, and knows beforehand what Slurm would refuse or never start."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tpme.bench.errors import UserError
from tpme.bench.limits import resolved
from tpme.bench.run.engines.profile import RunProfile
from tpme.bench.run.engines.slurm_jobs import jobs_folder
from tpme.bench.run.engines.slurm_queue import max_array_size, nodes
from tpme.bench.run.engines.slurm_task import SlurmTask
from tpme.bench.run.job import Job
from tpme.bench.slurm_commands import SlurmError, in_short

MARGIN_S = 300.0
"""What a job gets besides the time limits of its cells: to start, and for submitit's signal before its end."""
RESERVED = frozenset({"array", "chdir", "dependency", "error", "job-name", "output", "signal", "time", "wrap"})
"""Options of sbatch that are not the profile's to set."""


class Submitter:
    """Submits tasks of one kind of cells.

    Args:
        profile: what each task asks for. same_node: the seeds of a cell are one task, hence on one node.

    Raises:
        UserError: Slurm's commands are missing or its controller does not answer, the partition does not exist, or
            none of its nodes has what the profile asks for.
    """

    def __init__(self, profile: RunProfile, same_node: bool) -> None:
        self.profile, self.same_node = profile, same_node
        if wrong := RESERVED & {name.replace("_", "-") for name in profile.extra}:
            raise UserError(f"run.extra: '{min(wrong)}' is not the profile's to set")
        self.nodes = nodes(profile.partition)
        self.most_tasks = max_array_size()
        where = f"partition '{profile.partition}'" if profile.partition else "the default partition"
        for what, wanted, most in (
            ("cpus", profile.cpus, max((node.cpus for node in self.nodes), default=0)),
            ("gpus", profile.gpus, max((node.gpus for node in self.nodes), default=0)),
        ):
            if wanted > most:
                raise UserError(f"run.{what} = {wanted}: no node of {where} has more than {most}")
        if profile.nodes > len(self.nodes):
            raise UserError(f"run.nodes = {profile.nodes}: {where} has {len(self.nodes)}")

    def check(self, attempts: Sequence[Job], run: Path) -> None:
        """Raise UserError for attempts that Slurm would refuse, or never start."""
        if "%" in str(resolved(run)):
            raise UserError(f"{run}: Slurm replaces '%' in paths; choose a folder without it")
        name = "gpus" if attempts[0].cell.device == "cuda" else "cpus"
        offered: int = getattr(self.profile, name)
        for devices in sorted({job.cell.training.devices for job in attempts}):
            here, rest = divmod(devices, self.profile.nodes)
            if rest:
                raise UserError(
                    f"training.devices = {devices}: run.nodes = {self.profile.nodes} nodes cannot share them evenly"
                )
            if here > offered:
                each = " a node" if self.profile.nodes > 1 else ""
                raise UserError(f"training.devices = {devices}: more than run.{name} = {offered} of the profile{each}")
        longest = max(map(self.time_s, self.tasks(attempts)))
        limits = [node.limit_s for node in self.nodes if node.limit_s is not None]
        if len(limits) == len(self.nodes) and longest > max(limits):
            raise UserError(
                f"a job asks for {longest:g} s, and the partition ends jobs after {max(limits):g} s; lower the "
                "matrix's time_limit_s, or set run.time_s"
            )

    def tasks(self, jobs: Iterable[Job]) -> list[tuple[Job, ...]]:
        """The jobs of each task: one, or with ``same_node`` those that differ in their seed alone."""
        if not self.same_node:
            return [(job,) for job in jobs]
        together: dict[str, list[Job]] = {}
        for job in jobs:
            together.setdefault(job.cell.model_copy(update={"seed": 0}).model_dump_json(), []).append(job)
        return [tuple(task) for task in together.values()]

    def time_s(self, jobs: Iterable[Job]) -> float:
        """Time limit of a task that runs ``jobs``."""
        return float(self.profile.time_s or sum(job.time_limit_s for job in jobs) + MARGIN_S)

    def submit(
        self, run: Path, name: str, work: SlurmTask, tasks: Sequence[object], time_s: float, after: Sequence[str] = ()
    ) -> str:
        """Submit ``work`` on each of ``tasks`` as one job array; returns its number.

        Args:
            run: the run folder. name: of the job. time_s: time limit of a task. after: ids of jobs to wait for.

        Raises SlurmError with the words of sbatch.
        """
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        profile = self.profile
        extra: dict[str, Any] = {"requeue": True} | profile.extra
        if after:
            extra["dependency"] = f"afterany:{':'.join(after)}"
        asked = {
            "partition": profile.partition,
            "constraint": profile.constraint,
            "gpus_per_node": profile.gpus or None,
        }
        executor = SlurmExecutor(folder=resolved(jobs_folder(run)), python=profile.container)
        executor.update_parameters(
            job_name=name,
            time=math.ceil(time_s / 60),
            nodes=work.nodes,
            ntasks_per_node=1,
            cpus_per_task=profile.cpus,
            array_parallelism=len(tasks),
            srun_args=[f"--cpus-per-task={profile.cpus}"],  # which srun does not take from sbatch any more
            additional_parameters={key: value for key, value in extra.items() if value is not False},
            **{key: value for key, value in asked.items() if value is not None},
        )
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                jobs = executor.map_array(work, tasks)
        except (FailedJobError, FailedSubmissionError) as error:
            raise SlurmError(f"sbatch: {in_short(str(error))}") from None
        return str(jobs[0].job_id).partition("_")[0]
