"""One process and one device per cell: time limits, failures as records, resuming what is missing.

A run folder holds ``cells/METHOD-ID/attempt-N.json`` and what lies beside it. A cell whose latest attempt ended in a
way that would come out the same again is done; one that was killed, ended in an error or never ended is run again. The
failure of one cell never stops the matrix.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tpme.bench.errors import UserError
from tpme.bench.job import Job, code_version, parse_progress
from tpme.bench.matrix import Dataset, DatasetEntry, MatrixFile, expand
from tpme.bench.record import (
    Cell,
    CellResult,
    Failure,
    Reading,
    RecordError,
    Status,
    attempt_number,
    cell_id,
    read_result,
    write_atomically,
    write_result,
)

FINISHED: frozenset[Status] = frozenset({"ok", "oom", "diverged", "timeout", "skipped"})
"""Ends that a second attempt would only repeat."""
STOP_GRACE_S = 10.0


@dataclass(frozen=True)
class Task:
    """One cell of a run, its identity and its folder."""

    cell: Cell
    cell_id: str
    folder: Path


def store_folder(given: Path | None) -> Path:
    """Where prepared catalogues, token tables and feature caches are kept between runs."""
    if given is not None:
        return given.resolve()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TPME_STORE") or Path(cache) / "tpme").resolve()


def prepare_datasets(matrix: MatrixFile, store: Path, console: Console) -> dict[str, tuple[Path, Dataset]]:
    """Open the matrix's prepared data sets; the built-in catalogue is prepared into the store on first use."""
    from tpme.bench.task.dataset import read_manifest

    found = {}
    for entry in matrix.datasets:
        path = _synthetic(entry, store, console) if entry.path is None else entry.path.expanduser().resolve()
        manifest = read_manifest(path)
        found[entry.name] = path, Dataset(path, manifest.fingerprint, manifest.modalities)
    return found


def _synthetic(entry: DatasetEntry, store: Path, console: Console) -> Path:
    from pydantic import ValidationError

    from tpme.bench.task.prepare import prepare
    from tpme.bench.task.sources.synthetic import Synthetic, generate

    try:
        settings = Synthetic(**(entry.synthetic or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"data set '{entry.name}', synthetic.{where}: {first['msg']}") from None
    identity = f"{settings.model_dump_json()} {entry.image_size}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = store / "datasets" / f"synthetic-{name}"
    if not (path / "dataset.json").is_file():
        console.print(f"Preparing the built-in catalogue '{entry.name}' ...")
        prepare(generate(settings), path, image_size=entry.image_size)
    return path


def plan(
    matrix: MatrixFile, run: Path, store: Path, *, device: str, methods_path: Sequence[Path], console: Console
) -> tuple[list[Task], dict[str, Path], str]:
    """All cells of a matrix with their identity; the paths of the data sets; the version of the measured code."""
    from tpme.methods.registry import BUILTIN, source_file

    data = prepare_datasets(matrix, store, console)
    cells = expand(matrix, {name: entry for name, (_, entry) in data.items()}, device=device, methods_path=methods_path)
    plugins = sorted({cell.method for cell in cells} - set(BUILTIN))
    version = code_version([source_file(name, methods_path) for name in plugins])
    tasks = []
    for cell in cells:
        identity = cell_id(cell, version)
        slug = re.sub(r"[^A-Za-z0-9]+", "-", cell.label).strip("-") or "method"
        tasks.append(Task(cell, identity, run / "cells" / f"{slug}-{identity}"))
    return tasks, {name: path for name, (path, _) in data.items()}, version


def latest_attempt(folder: Path) -> CellResult | None:
    """The latest record of a cell, or ``None``; a record that cannot be read counts as none."""
    paths = sorted(folder.glob("attempt-*.json"), key=attempt_number)
    records = [path for path in paths if re.fullmatch(r"attempt-\d+", path.stem)]
    try:
        return read_result(records[-1]) if records else None
    except RecordError:
        return None


def run_matrix(
    matrix: MatrixFile,
    run: Path,
    *,
    store: Path,
    device: str,
    methods_path: Sequence[Path] = (),
    time_limit_s: float | None = None,
    console: Console,
) -> list[CellResult]:
    """Run every cell of ``matrix`` that is not done; returns the latest records of all its cells, in order.

    Ctrl-C stops the running cell, leaves no record of it, and raises KeyboardInterrupt; a second call goes on there.
    """
    tasks, paths, version = plan(matrix, run, store, device=device, methods_path=methods_path, console=console)
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "matrix.json", (matrix.model_dump_json(indent=1) + "\n").encode())
    results = []
    with _progress(console) as bars:
        overall = bars.add_task("matrix", total=len(tasks), detail="")
        for task in tasks:
            result = latest_attempt(task.folder)
            if result is None or result.status not in FINISHED:
                job = _job(task, paths[task.cell.dataset], store, version, methods_path, matrix.cache_limit_bytes)
                result = _run_cell(job, time_limit_s or matrix.time_limit_s, bars)
                bars.console.print(_line(result))
            results.append(result)
            bars.advance(overall)
    return results


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
    )


def _job(
    task: Task, dataset: Path, store: Path, version: str, methods_path: Sequence[Path], cache_limit_bytes: int
) -> Job:
    attempts = [attempt_number(path) for path in task.folder.glob("attempt-*.json")]
    return Job(
        cell=task.cell,
        cell_id=task.cell_id,
        attempt=max(attempts, default=0) + 1,
        code_version=version,
        dataset_path=dataset,
        store=store,
        folder=task.folder,
        methods_path=tuple(path.resolve() for path in methods_path),
        cache_limit_bytes=cache_limit_bytes,
    )


def _run_cell(job: Job, limit_s: float, bars: Progress) -> CellResult:
    """Run one attempt in its own process and return its record, written by the cell or, if it could not, by us."""
    job_file = job.file(".job.json")
    write_atomically(job_file, job.model_dump_json(indent=1).encode())
    bar = bars.add_task(job.cell.label, total=100, detail="start")
    started, began = time.monotonic(), datetime.now(UTC)
    command = [sys.executable, "-m", "tpme.bench.cell", str(job_file)]
    with job.file(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            timed_out = _watch(process, limit_s, bars, bar)
        except BaseException:
            _stop(process)
            _forget(job)
            raise
        finally:
            bars.remove_task(bar)
            job_file.unlink(missing_ok=True)
    record = job.file(".json")
    if record.exists():
        return read_result(record)
    result = _unrecorded(job, process.returncode, timed_out, limit_s, time.monotonic() - started, began)
    write_result(result, record)
    return result


def _watch(process: subprocess.Popen[bytes], limit_s: float, bars: Progress, bar: TaskID) -> bool:
    """Show the cell's progress until it ends or its time is up; returns whether it was."""
    import selectors

    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    deadline, buffered = time.monotonic() + limit_s, b""
    while time.monotonic() < deadline:
        if selector.select(timeout=0.5):
            read = process.stdout.read()
            if not read:
                break
            *lines, buffered = (buffered + read).split(b"\n")
            for event in filter(None, (parse_progress(line.decode(errors="replace")) for line in lines)):
                bars.update(bar, completed=round(100 * event[1]), detail=event[0])
    else:
        _stop(process)
        return True
    process.wait()
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the cell and everything it started: politely, then not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
    process.wait()


def _forget(job: Job) -> None:
    """Remove what an interrupted attempt left, so that nothing half-written stays behind."""
    for path in (*job.folder.glob(f"attempt-{job.attempt}.*"), *job.folder.glob(f".attempt-{job.attempt}.*")):
        path.unlink(missing_ok=True)
    if not any(job.folder.iterdir()):
        job.folder.rmdir()


def _unrecorded(job: Job, code: int, timed_out: bool, limit_s: float, wall_s: float, began: datetime) -> CellResult:
    """The record of a cell whose process ended without writing one."""
    log = job.file(".log")
    status: Status = "timeout" if timed_out else "killed" if code < 0 else "error"
    if timed_out:
        message = f"took longer than its time limit of {limit_s:g} s; raise time_limit_s or --time-limit"
    elif code < 0:
        hint = "; the kernel does that when host memory runs out" if -code == signal.SIGKILL else ""
        message = f"its process was ended by {signal.Signals(-code).name}{hint}"
    else:
        told = log.read_text(errors="replace").strip().splitlines()
        message = f"its process ended with code {code}: {told[-1] if told else 'no output'} (log: {log.name})"
    return CellResult(
        cell_id=job.cell_id,
        attempt=job.attempt,
        cell=job.cell,
        code_version=job.code_version,
        status=status,
        failure=Failure(phase="unknown", message=message),
        started_at=began.isoformat(timespec="seconds"),
        wall_s=wall_s,
        epoch_time_s=Reading.missing("training epochs", f"the cell ended as '{status}' without a record of its own"),
    )


def _line(result: CellResult) -> str:
    """What happened to a cell, in one line."""
    label, mark = result.cell.label, "[green]ok[/]" if result.status == "ok" else f"[red]{result.status}[/]"
    if result.failure:
        return f"{label:<18} {mark}  {result.failure.message}"
    best = max((epoch.valid_recall_10 for epoch in result.epochs), default=None)
    epoch_s = result.epoch_time_s.value
    told = [f"{result.wall_s:.1f} s", f"{epoch_s:.2f} s an epoch" if epoch_s is not None else "nothing to train"]
    if best is not None:
        told.append(f"validation Recall@10 {best:.4f}")
    return f"{label:<18} {mark}  {', '.join(told)}"
