"""What the processes of a cell on several devices do beyond training it: join, gather what they measured, fail as one.

Rank 0 writes the record of a cell that ended well. Where one fails, the first to do so writes it in a hidden file, from
which the launcher makes the record: it alone knows of ranks that were killed (``tpme.bench.run.rank_failures``).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch

from tpme.bench.errors import UserError, one_line
from tpme.bench.measure.environment import environment
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.measure.rank_log import RankLog, job_environment, of_job
from tpme.bench.record import CellResult, Environment, Reading, Status, write_result
from tpme.bench.run.job import Job
from tpme.bench.run.rank_failures import AFTER_ANOTHER, claim
from tpme.bench.train.facts import CellFacts
from tpme.bench.train.ranks import Ranks
from tpme.bench.train.split import COLLECTIVES


class RankRun(Protocol):
    """One rank's attempt at the cell (``CellRun``)."""

    job: Job
    phases: PhaseLog
    facts: CellFacts
    ranks: Ranks
    environments: Sequence[Environment]

    def record(self, status: Status) -> CellResult:
        """Write what lies beside the record, and return it."""


def own_device(job: Job) -> str:
    """The device of this process, before it joins the others: the instruments must start first."""
    local = os.environ.get("LOCAL_RANK", "")
    several = job.cell.device == "cuda" and job.cell.training.devices > 1
    return f"cuda:{local}" if several and local.isdecimal() else job.cell.device


def join(job: Job, phases: PhaseLog) -> tuple[Ranks, list[Environment]]:
    """The ranks that train the cell, of which this process is one, and their environments; see ``Ranks.join``.

    A process that cannot join the others is ended, with one line.
    """
    devices = job.cell.training.devices
    if devices == 1:
        return Ranks.alone(torch.device(job.cell.device)), []
    try:
        ranks = Ranks.join(devices, job.cell.device)
    except UserError as error:
        sys.exit(f"tpme: {error}")
    phases.meet = ranks.wait
    return ranks, ranks.from_first(ranks.objects(environment(ranks.device)))


def show_where_it_hangs() -> None:
    """From now on write what all threads do to the log when SIGTERM arrives, also from within a collective."""
    faulthandler.register(signal.SIGTERM, chain=True)


def record_of_all(run: RankRun, status: Status) -> CellResult | None:
    """The record of a cell on several devices, on rank 0; ``None`` on the others.

    Ends this process where ``status`` is not ``ok``.
    """
    if status != "ok":
        _fail(run, status)
    try:
        logs = run.ranks.objects(_log(run))
    except RuntimeError as error:
        _end(AFTER_ANOTHER, f"rank {run.ranks.rank} cannot gather what was measured: {one_line(error)}")
    run.ranks.leave()
    return None if logs is None else of_job(run.record(status), logs, job_environment(run.environments))


def _fail(run: RankRun, status: Status) -> NoReturn:
    path = claim(run.job, run.ranks.rank)
    if path is None:
        _end(AFTER_ANOTHER, f"rank {run.ranks.rank} ends, because another one has failed")
    write_result(of_job(run.record(status), [_log(run)], job_environment(run.environments)), path)
    _end(1)


def _end(code: int, message: str = "") -> NoReturn:
    """End at once: taking down a broken group of processes may hang, and the others wait for this one."""
    sys.stderr.write(f"tpme: {message}\n" if message else "")
    sys.stderr.flush()
    os._exit(code)


def _log(run: RankRun) -> RankLog:
    outcome = run.facts.trainer.outcome if run.facts.trainer else None
    first = outcome.first_phase if outcome else 0
    not_split = Reading.missing("parts of a step", "the attempt ended before they were measured")
    return RankLog(
        rank=run.ranks.rank,
        environment=run.environments[run.ranks.rank],
        phases=tuple(run.phases.phases),
        training_memory=run.phases.training_memory(first) if outcome and outcome.epochs else None,
        first=first,
        counters=run.phases.counters(),
        flags=tuple(run.phases.flags()),
        collective_s=run.facts.counters.get(COLLECTIVES, not_split),
    )
