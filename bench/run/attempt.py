"""One attempt at a cell on this machine: its process, its time limit, and the record of one that wrote none."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tpme.bench.errors import LONGEST_MESSAGE, UserError
from tpme.bench.record import CellResult, Failure, Reading, RecordError, Status, read_result, write_result
from tpme.bench.redact import redact_file
from tpme.bench.run import process
from tpme.bench.run.job import Job, time_limit_message
from tpme.bench.run.live import LiveLog
from tpme.bench.run.process import Ending, Supervision, run_process
from tpme.bench.run.rank_failures import blamed, failed_elsewhere, in_words, leave_note, left_record, notes
from tpme.bench.run.rank_processes import RanksEnding, RanksOfNode, run_ranks
from tpme.bench.writing import write_atomically

MEETING_S = 300.0
"""How long a node waits for the one of rank 0."""


def run_job(
    job: Job,
    python: Sequence[str] = (sys.executable, "-P"),
    content: bytes | None = None,
    show: Callable[[str, float], None] = lambda *_: None,
    live: LiveLog | None = None,
    lock: int | None = None,
    variables: Mapping[str, str] | None = None,
    caught: list[int] | None = None,
) -> CellResult:
    """Run one attempt in its own process, or in one for each of its devices.

    Returns the record of the cell or, if it left none, one written here.

    Args:
        job: what to run. python: the interpreter; ``-P``: no file of the working directory hides a package.
        content: of the job file, where the cell's code is of another version. show: called with progress.
        live: logs its epochs, which the cell then reports. lock: of ``locked_run``, which the cell holds, too.
        variables: further environment variables. caught: see ``Supervision``.
    """
    started, began = time.monotonic(), datetime.now(UTC)
    lines = contextlib.nullcontext() if live is None else live.lines_of(job)
    with _written(job, content) as job_file, lines as hear:
        how = Supervision(job.time_limit_s, show, hear, lock, variables or {}, caught)
        ending: Ending | RanksEnding
        if job.cell.training.devices == 1:
            started_cell = command(job_file, python) if live is None else command(job_file, python, "live_cell")
            ending = run_process(started_cell, job.log(), how)
        else:
            with RanksOfNode.first(job.cell.training.devices) as node:
                ending = _run_ranks(job, job_file, node, how, python, live is not None)
    return _result(job, ending, time.monotonic() - started, began)


@contextlib.contextmanager
def _written(job: Job, content: bytes | None = None) -> Iterator[Path]:
    """The job file of an attempt, within the block; where that is left by an exception, nothing but a record stays."""
    job_file = job.file(".job.json")
    remove_files(job)  # of the same attempt of a launcher that was killed
    try:
        write_atomically(job_file, content or job.model_dump_json(indent=1).encode())
        yield job_file
    except BaseException:
        if not job.file(".json").exists():
            remove_files(job)
        raise
    finally:
        job_file.unlink(missing_ok=True)


def run_on_nodes(
    job: Job, number: int, nodes: int, meeting: str, variables: Mapping[str, str] | None = None
) -> CellResult | None:
    """Run this node's ranks of an attempt of which every one of ``nodes`` nodes runs as many; all see its folder.

    Args:
        job: what to run. number: of this node, from 0. meeting: a name that all of them know, and no earlier try at
            this attempt had. variables: see ``run_job``.

    Returns the record on node 0, as ``run_job`` does, ``None`` on the others.
    """
    how = Supervision(job.time_limit_s, variables=variables or {})
    job_file, point = job.file(".job.json"), job.folder / f".attempt-{job.attempt}.meeting-{meeting}"
    if number > 0:
        if (met := _appointment(job, point)) is not None:
            node = RanksOfNode(job.cell.training.devices, number, nodes, *met)
            leave_note(job, _run_ranks(job, job_file, node, how))
        return None
    started, began = time.monotonic(), datetime.now(UTC)
    with _written(job):
        with RanksOfNode.first(job.cell.training.devices, nodes) as node:
            write_atomically(point, json.dumps([node.address, node.port]).encode())
            ending = _run_ranks(job, job_file, node, how)
        leave_note(job, ending)
        until_s = time.monotonic() + 2 * process.GRACE_S  # each node gives its ranks some time to end
        while not ending.well and len(notes(job)) < nodes and time.monotonic() < until_s:
            time.sleep(process.POLL_S)
    return _result(job, ending, time.monotonic() - started, began)


def _appointment(job: Job, point: Path) -> tuple[str, int] | None:
    """Address and port that node 0 writes into the file ``point``; ``None`` where it ran the attempt before.

    Raises UserError where it writes neither, in time.
    """
    until_s = time.monotonic() + MEETING_S
    while not job.file(".json").exists():
        with contextlib.suppress(FileNotFoundError):
            address, port = json.loads(point.read_bytes())
            return address, port
        if time.monotonic() > until_s:
            raise UserError(
                f"{point}: node 0 did not write it within {MEETING_S:g} s; do all nodes see the run folder?"
            )
        time.sleep(process.POLL_S)
    return None


def _run_ranks(
    job: Job,
    job_file: Path,
    node: RanksOfNode,
    how: Supervision,
    python: Sequence[str] = (sys.executable, "-P"),
    live: bool = False,
) -> RanksEnding:
    def of_rank(rank: int) -> list[str]:
        return command(job_file, python, "live_cell") if live and rank == 0 else command(job_file, python)

    stopped = partial(failed_elsewhere, job) if node.nodes > 1 else lambda: False
    return run_ranks(of_rank, node, job.log, how, stopped)


def _result(job: Job, ending: Ending | RanksEnding, wall_s: float, began: datetime) -> CellResult:
    """The record of an attempt that has ended, written here if it left none."""
    record, unreadable = job.file(".json"), None
    for rank in range(job.cell.training.devices):
        redact_file(job.log(rank))
    if record.exists():
        try:
            result = read_result(record)
        except RecordError as error:
            unreadable = str(error)
        else:
            _remove_hidden(job)
            return result
    lost = None
    if isinstance(ending, RanksEnding):
        if unreadable is None and (left := left_record(job, ending)) is not None:
            write_result(left, record)
            _remove_hidden(job)
            return left
        lost, code = blamed(job, ending)
        ending = Ending(code, ending.timed_out, ending.last)
    result = failed_result(job, ending, wall_s, began, unreadable, lost)
    write_lost(job, result)
    return result


def write_lost(job: Job, result: CellResult) -> None:
    """Write the record of an attempt that left none, and remove what it left except its logs."""
    remove_files(job, but=[job.log(rank) for rank in range(job.cell.training.devices)])
    write_result(result, job.file(".json"))


def command(job_file: Path, python: Sequence[str], module: str = "cell") -> list[str]:
    """The command that runs one cell."""
    return [*python, "-m", f"tpme.bench.run.{module}", str(job_file)]


def _remove_hidden(job: Job) -> None:
    """Remove what the ranks of an attempt told each other."""
    if job.cell.training.devices > 1:
        for path in job.folder.glob(f".attempt-{job.attempt}.*"):
            path.unlink(missing_ok=True)


def remove_files(job: Job, but: Collection[Path] = ()) -> None:
    """Remove the files of an attempt that left no record, save for ``but``."""
    for path in (*job.folder.glob(f"attempt-{job.attempt}.*"), *job.folder.glob(f".*attempt-{job.attempt}.*")):
        if path not in but:
            path.unlink(missing_ok=True)
    if job.folder.is_dir() and not any(job.folder.iterdir()):
        job.folder.rmdir()


def failed_result(
    job: Job,
    ending: Ending,
    wall_s: float,
    began: datetime,
    unreadable: str | None = None,
    rank: int | None = None,
) -> CellResult:
    """The record of a cell whose process, or ``rank``, ended without writing one that can be read, and why."""
    log, which = job.log(rank or 0), "its process" if rank is None else in_words(job, rank)
    status: Status = "timeout" if ending.timed_out else "killed" if ending.code < 0 else "error"
    if ending.timed_out:
        message = time_limit_message(job.time_limit_s)
    elif ending.code < 0:
        hint = "; the kernel does this when host memory runs out" if -ending.code == signal.SIGKILL else ""
        message = f"{which} was ended by {_signal_name(-ending.code)}{hint} (log: {log.name})"
    elif unreadable is not None:
        message = f"its record cannot be read; did the code change during the run? {unreadable} (log: {log.name})"
    else:
        message = f"{which} ended with code {ending.code}: {_last_line(log) or ending.last} (log: {log.name})"
    return lost_result(job, status, message, wall_s, began)


def lost_result(job: Job, status: Status, message: str, wall_s: float, began: datetime) -> CellResult:
    """The record of an attempt that left none."""
    return CellResult(
        cell_id=job.cell_id,
        attempt=job.attempt,
        cell=job.cell,
        code_version=job.code_version,
        status=status,
        failure=Failure(phase="unknown", message=message),
        started_at=began.isoformat(timespec="seconds"),
        wall_s=wall_s,
        time_limit_s=job.time_limit_s,
        epoch_time_s=Reading.missing("training epochs", f"the cell ended as '{status}' without writing a record"),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _last_line(log: Path) -> str:
    if not log.is_file():  # of another node
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("tpme: ")[-LONGEST_MESSAGE:] if lines else ""
