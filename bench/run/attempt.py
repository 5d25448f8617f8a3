"""One attempt at a cell on this machine: its process, its time limit, and the record of one that wrote none."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tpme.bench.errors import LONGEST_MESSAGE
from tpme.bench.record import CellResult, Failure, Reading, RecordError, Status, read_result, write_result
from tpme.bench.redact import redact_file
from tpme.bench.run.job import Job, time_limit_message
from tpme.bench.run.live import LiveLog
from tpme.bench.run.process import Ending, run_process
from tpme.bench.writing import write_atomically


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
    """Run one attempt in its own process; returns the record of the cell or, if it left none, one written here.

    Args:
        job: what to run. python: the interpreter; ``-P``: no file of the working directory hides a package.
        content: of the job file, where the cell's code is of another version. show: called with progress.
        live: logs its epochs, which the cell then reports. lock: of ``locked_run``, which the cell holds, too.
        variables: further environment variables. caught: see ``run_process``.
    """
    job_file, record = job.file(".job.json"), job.file(".json")
    started, began = time.monotonic(), datetime.now(UTC)
    _remove_files(job)  # of the same attempt of a launcher that was killed
    try:
        write_atomically(job_file, content or job.model_dump_json(indent=1).encode())
        started_cell = command(job_file, python) if live is None else command(job_file, python, "live_cell")
        with contextlib.nullcontext() if live is None else live.lines_of(job) as hear:
            ending = run_process(
                started_cell,
                log=job.file(".log"),
                limit_s=job.time_limit_s,
                show=show,
                hear=hear,
                lock=lock,
                variables=variables,
                caught=caught,
            )
    except BaseException:
        if not record.exists():
            _remove_files(job)
        raise
    finally:
        job_file.unlink(missing_ok=True)
    redact_file(job.file(".log"))
    unreadable = None
    if record.exists():
        try:
            return read_result(record)
        except RecordError as error:
            unreadable = str(error)
    result = failed_result(job, ending, time.monotonic() - started, began, unreadable)
    _remove_files(job, but=job.file(".log"))
    write_result(result, record)
    return result


def command(job_file: Path, python: Sequence[str], module: str = "cell") -> list[str]:
    """The command that runs one cell."""
    return [*python, "-m", f"tpme.bench.run.{module}", str(job_file)]


def _remove_files(job: Job, but: Path | None = None) -> None:
    """Remove the files of an attempt that left no record, save for ``but``."""
    for path in (*job.folder.glob(f"attempt-{job.attempt}.*"), *job.folder.glob(f".*attempt-{job.attempt}.*")):
        if path != but:
            path.unlink(missing_ok=True)
    if job.folder.is_dir() and not any(job.folder.iterdir()):
        job.folder.rmdir()


def failed_result(
    job: Job, ending: Ending, wall_s: float, began: datetime, unreadable: str | None = None
) -> CellResult:
    """The record of a cell whose process ended without writing one, or wrote one that cannot be read, and why."""
    log = job.file(".log")
    status: Status = "timeout" if ending.timed_out else "killed" if ending.code < 0 else "error"
    if ending.timed_out:
        message = time_limit_message(job.time_limit_s)
    elif ending.code < 0:
        hint = "; the kernel does this when host memory runs out" if -ending.code == signal.SIGKILL else ""
        message = f"its process was ended by {_signal_name(-ending.code)}{hint} (log: {log.name})"
    elif unreadable is not None:
        message = f"its record cannot be read; did the code change during the run? {unreadable} (log: {log.name})"
    else:
        message = f"its process ended with code {ending.code}: {_last_line(log) or ending.last} (log: {log.name})"
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
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][-LONGEST_MESSAGE:] if lines else ""
