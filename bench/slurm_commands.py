"""Asks Slurm by its own commands, and whether a job of it still runs."""

from __future__ import annotations

import re
import shutil
import subprocess

from tpme.bench.errors import UserError
from tpme.bench.text import visible

PATIENCE_S = 60.0
"""Longest wait for an answer of Slurm."""
ENDED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "REVOKED", "TIMEOUT"),
    }
)
"""States that a job does not leave, unless it is requeued."""


class SlurmError(UserError):
    """Slurm refused something, or could not be asked."""


def ask(*command: str) -> str:
    """The answer of a command of Slurm; raises SlurmError with its words, on one line."""
    if shutil.which(command[0]) is None:
        raise SlurmError(f"no '{command[0]}' on PATH: run this where Slurm's commands are, on a login node")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {PATIENCE_S:g} s; is Slurm's controller running?") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {in_short(done.stderr)}")
    return done.stdout


def in_short(words: str) -> str:
    """What a command of Slurm said, on one line, without its own name before each."""
    lines = [re.sub(r"^\w+: (?:error|fatal): ", "", line.strip()) for line in words.splitlines() if line.strip()]
    return visible("; ".join(lines), 400) or "no reason given"


def is_running(job: str, restarts: int) -> bool:
    """Whether Slurm says that a job may still run as it was started, after so many restarts.

    A job that Slurm has forgotten does not run. Raises SlurmError where it cannot be asked.
    """
    try:
        shown = ask("scontrol", "--oneliner", "show", "job", job)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return False
        raise
    # The number of a whole array, which is that of one of its tasks, too, shows all tasks that there still are.
    own = next((line for line in shown.splitlines() if line.startswith(f"JobId={job} ")), "")
    state, times = (re.search(rf"\b{field}=(\w+)", own) for field in ("JobState", "Restarts"))
    if state is None or state[1] in ENDED or state[1] == "PENDING":
        return False
    return times is None or int(times[1]) == restarts
