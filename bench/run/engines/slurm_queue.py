"""What Slurm knows of the jobs of a run folder, by its own commands: ``squeue``, ``sinfo``, ``scontrol``, ``scancel``.

They are asked in place of ``sacct``: many clusters keep no accounting. The price is that Slurm forgets an ended job
after some minutes (MinJobAge); what it left then says the rest.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from tpme.bench.slurm_commands import ENDED, SlurmError, ask

RUNNING = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT"})


class SlurmJobState(NamedTuple):
    """What Slurm says of a job."""

    job: str
    """``123``, or ``123_4`` of an array."""
    state: str
    node: str
    reason: str
    """Why it waits or ended."""
    name: str
    elapsed_s: float

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDED


class NodeFacts(NamedTuple):
    """What a node offers."""

    name: str
    cpus: int
    gpus: int
    limit_s: float | None
    """The longest job of its partition; ``None``: no limit."""


def queue(prefix: str) -> dict[str, SlurmJobState]:
    """This user's jobs whose names begin with ``prefix``, also those that ended minutes ago; by their ids."""
    listed = ask("squeue", "--noheader", "--array", "--states=all", f"--user={user()}", "--format=%i|%T|%N|%r|%j|%M")
    parts = (line.split("|") for line in listed.splitlines())
    return {
        job: SlurmJobState(job, state, node, reason, name, duration_s(elapsed) or 0.0)
        for job, state, node, reason, name, elapsed in (part for part in parts if len(part) == 6)
        if name.startswith(prefix)
    }


def user() -> str:
    """The name of the user whose jobs these are."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def why_ended(state: SlurmJobState | None) -> str:
    """How a job ended, in Slurm's words."""
    if state is None:
        return "and Slurm has forgotten how"
    node = f" on node {state.node}" if state.node else ""
    reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
    return f"as {state.state}{reason}{node}"


def cancel(jobs: Iterable[str]) -> None:
    """End jobs; those that have ended already are no error."""
    if named := list(jobs):
        ask("scancel", "--quiet", *named)


def max_array_size() -> int:
    """Most tasks of a job array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), flags=re.MULTILINE)
    return max(1, int(found[1])) if found else 1000


def nodes(partition: str | None) -> list[NodeFacts]:
    """The nodes of a partition, by default of the default one.

    Raises SlurmError where there is no such partition, or Slurm cannot be asked.
    """
    listed = [line.split("|") for line in ask("sinfo", "--noheader", "--Node", "--format=%P|%N|%c|%G|%l").splitlines()]
    names = {line[0].rstrip("*") for line in listed}
    wanted = {name for name in names if name == partition}
    if partition is None:
        wanted = {line[0].rstrip("*") for line in listed if line[0].endswith("*")} or names
    elif not wanted:
        raise SlurmError(f"partition '{partition}': Slurm has none of this name; it has {', '.join(sorted(names))}")
    return [
        NodeFacts(node, int(cpus.rstrip("+")), _gpus(gres), duration_s(limit))
        for name, node, cpus, gres, limit in listed
        if name.rstrip("*") in wanted
    ]


def _gpus(gres: str) -> int:
    """The GPUs in a list of generic resources: 8 of ``gpu:a100:8(S:0-1),nvme:1``."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu:(?:[^:,(]+:)?(\d+)", gres))


def duration_s(text: str) -> float | None:
    """Seconds of a time as Slurm writes it (``1-02:00:00``, ``30:00``); ``None`` for one without a limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
