"""From a matrix to its records: what is missing runs on an engine; failures are records, unfinished runs resume.

A run folder holds ``cells/METHOD-ID/attempt-N.json`` and its logs, ranks and samples. A cell is done when another
attempt would end as its latest one did; a cell that was killed, ended in an error or never ended is run again. The
failure of one cell does not stop the matrix.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tpme.bench.errors import UserError, first_problem
from tpme.bench.lifetimes import end_orphans
from tpme.bench.limits import resolved
from tpme.bench.owner_lock import OwnedError, owned
from tpme.bench.record import (
    CELLS_FILE,
    Cell,
    CellResult,
    cell_id,
)
from tpme.bench.redact import without_home
from tpme.bench.run.cell_checks import MetaCells, check_cells
from tpme.bench.run.engines import Engine
from tpme.bench.run.engines.local import LocalEngine
from tpme.bench.run.engines.slurm_jobs import refuse_jobs_in_slurm
from tpme.bench.run.job import Job
from tpme.bench.run.matrix import DatasetEntry, MatrixFile, PreparedDataset, expand
from tpme.bench.run.progress import Screen, remaining_table
from tpme.bench.run.remaining import Latest, is_finished, latest_attempt, remaining
from tpme.bench.run.version import code_version
from tpme.bench.writing import make_folder, write_atomically

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Error codes of a file system without locks."""
LOCK_PATIENCE_S = 5.0
"""Longest wait for the lock of a run folder: a killed launcher's cell gives it back as soon as the kernel ends it."""


def choose_device(name: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes a GPU where torch sees one.

    Raises UserError for any other name, and for ``cuda`` without a GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: choose cpu, cuda or auto")
    if name == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise UserError("--device cuda: torch sees no CUDA device; 'tpme doctor' says why, --device cpu runs without")
    return "cpu"


def store_folder(path: Path | None) -> Path:
    """Where prepared catalogues, token tables and feature caches are kept between runs."""
    if path is not None:
        return resolved(path)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return resolved(Path(os.environ.get("TPME_STORE") or Path(cache) / "tpme"))


def prepare_datasets(matrix: MatrixFile, store: Path, console: Console) -> dict[str, PreparedDataset]:
    """Open the matrix's prepared data sets; the built-in catalogue is prepared into the store on first use."""
    from tpme.bench.task.dataset import read_manifest, verify

    datasets = {}
    for entry in matrix.datasets:
        path = _synthetic(entry, store, console) if entry.path is None else resolved(entry.path)
        manifest = read_manifest(path)
        verify(path, manifest, store)
        datasets[entry.name] = PreparedDataset(path, manifest.fingerprint, manifest.modalities)
    return datasets


def _synthetic(entry: DatasetEntry, store: Path, console: Console) -> Path:
    from pydantic import ValidationError

    from tpme.bench.task.dataset import damage_of
    from tpme.bench.task.prepare import prepare
    from tpme.bench.task.sources.synthetic import Synthetic, generate
    from tpme.bench.task.workspace import building_folder, workspace

    try:
        settings = Synthetic(**(entry.synthetic or {}))
    except ValidationError as error:
        first = first_problem(error)
        raise UserError(f"data set '{entry.name}', synthetic.{first.field}: {first.message}") from None
    # Equal settings give equal data only while the code that draws it stays the same.
    generators = [path.read_bytes() for path in sorted(Path(str(files("tpme.bench.task.sources"))).glob("*.py"))]
    code = hashlib.sha256(b"".join(generators)).hexdigest()
    modalities = entry.modalities or ("text", "image")
    identity = f"{settings.model_dump_json()} {entry.image_size} {sorted(modalities)} {code}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = store / "datasets" / f"synthetic-{name}"
    if damage_of(path, store) is not None or building_folder(path).exists():
        with workspace(path):  # waits for a process that prepares it, or clears away what a killed one left
            if path.exists() and (damage := damage_of(path, store)) is not None:
                console.print(f"{damage.partition('; ')[0]}; it is the built-in catalogue, which is made again")
                shutil.rmtree(path)
    if not path.exists():
        console.print(f"Preparing the built-in catalogue '{entry.name}' ...")
        progress = Progress(console=console, disable=True)
        prepare(generate(settings, modalities), path, image_size=entry.image_size, progress=progress)
    return path


def make_jobs(
    matrix: MatrixFile,
    run: Path,
    store: Path,
    *,
    device: str,
    methods_path: Sequence[Path] = (),
    time_limit_s: float | None = None,
    save_adapters: bool = False,
    metas: MetaCells | None = None,
    console: Console,
) -> list[Job]:
    """The first attempt at every cell of a matrix, in the order they run; ``metas`` keeps its cells on ``meta``."""
    from tpme.bench.counting.batch import DataShape
    from tpme.bench.run.preflight import check_inputs
    from tpme.bench.task.dataset import Dataset

    datasets = prepare_datasets(matrix, store, console)
    cells = expand(matrix, datasets, device=device, methods_path=methods_path)
    shapes = {name: DataShape.of(Dataset.open(data.path)) for name, data in datasets.items()}
    metas = metas or MetaCells(methods_path)
    check_cells(cells, shapes, matrix.cache_limit_bytes, metas)
    check_inputs(cells, {name: data.path for name, data in datasets.items()}, metas)
    jobs = jobs_of(cells, matrix, datasets, run, store, methods_path)
    changes = {"save_adapters": save_adapters} | ({} if time_limit_s is None else {"time_limit_s": time_limit_s})
    return [job.model_copy(update=changes) for job in jobs]


def jobs_of(
    cells: Iterable[Cell],
    matrix: MatrixFile,
    datasets: Mapping[str, PreparedDataset],
    run: Path,
    store: Path,
    methods_path: Sequence[Path] = (),
) -> list[Job]:
    """The first attempt at each of ``cells``, unchecked."""
    from tpme.methods.registry import source_file

    cells = list(cells)
    versions = {name: code_version(source_file(name, methods_path)) for name in {cell.method for cell in cells}}
    return [
        Job(
            cell=cell,
            cell_id=(identity := cell_id(cell, versions[cell.method])),
            code_version=versions[cell.method],
            dataset_path=datasets[cell.dataset].path,
            store=store,
            folder=run / "cells" / f"{slug(cell)}-{identity}",
            methods_path=tuple(map(resolved, methods_path)),
            cache_limit_bytes=matrix.cache_limit_bytes,
            time_limit_s=matrix.time_limit_s,
            probe_items=matrix.probe_items,
        )
        for cell in cells
    ]


def slug(cell: Cell) -> str:
    """The label of a cell as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", cell.label).strip("-") or "method"


def run_matrix(
    matrix: MatrixFile,
    run: Path,
    *,
    store: Path,
    device: str,
    methods_path: Sequence[Path] = (),
    time_limit_s: float | None = None,
    save_adapters: bool = False,
    dry_run: bool = False,
    engine: Engine | None = None,
    console: Console,
) -> list[CellResult]:
    """Run every cell of ``matrix`` that is not finished; returns the latest records of all its cells, in order.

    With ``save_adapters`` what each method has trained is kept beside its record; a cell without that is not finished,
    and neither is one whose record lacks the representation space that the matrix asks for. A ``dry_run`` checks
    everything, lists what would run, and returns what there is. ``engine`` is where cells run, by default this
    machine, one after the other.

    Ctrl-C stops the running cell, leaves no record of it, and raises KeyboardInterrupt; a second call resumes.
    SIGTERM and SIGHUP do the same and raise SystemExit.
    """
    metas = MetaCells(methods_path)
    jobs = make_jobs(
        matrix,
        run,
        store,
        device=device,
        methods_path=methods_path,
        time_limit_s=time_limit_s,
        save_adapters=save_adapters,
        metas=metas,
        console=console,
    )
    engine = engine or LocalEngine()
    found = [latest_attempt(job) for job in jobs]
    latest = [attempt.result for attempt in found]
    if missing := [job for job, result in zip(jobs, latest, strict=True) if not is_finished(result, job)]:
        engine.check(missing)
    screen = Screen(console, len(jobs))
    _announce(jobs, latest, run, metas, screen, rows=dry_run, engine=engine)
    if dry_run:
        for attempt in found:
            _tell_damage(attempt, screen)
        return [result for result in latest if result is not None]
    with locked_run(run, shared=engine.shared) as lock, screen:
        _write_matrix(run, matrix, jobs)
        results = _run_missing(jobs, found, engine, screen, lock)
    return [results[job.folder] for job in jobs]


def _run_missing(
    jobs: Sequence[Job], found: Sequence[Latest], engine: Engine, screen: Screen, lock: int
) -> dict[Path, CellResult]:
    """The records of all cells by folder: the latest, or those of another attempt at cells that are not finished.

    ``found`` is what was there before the run folder was locked; another launcher may have finished a cell since.
    """
    results: dict[Path, CellResult] = {}
    attempts: list[Job] = []
    for job, latest in zip(jobs, found, strict=True):
        if not is_finished(latest.result, job):
            latest = latest_attempt(job)
        if is_finished(latest.result, job):
            results[job.folder] = _ended(job, latest.result, screen)
        elif job.folder not in {attempt.folder for attempt in attempts}:
            _tell_damage(latest, screen)
            attempts.append(job.model_copy(update={"attempt": latest.number + 1}))
    for job, result in engine.run(attempts, screen, lock) if attempts else ():
        screen.print_outcome(result, job.file(".log"))
        results[job.folder] = _ended(job, result, screen)
    return results


def _ended(job: Job, result: CellResult, screen: Screen) -> CellResult:
    if result.status == "ok":
        shutil.rmtree(job.procedure, ignore_errors=True)  # of a cell that was killed before it could
    screen.advance()
    return result


def _announce(
    jobs: Sequence[Job],
    latest: Sequence[CellResult | None],
    run: Path,
    metas: MetaCells,
    screen: Screen,
    *,
    rows: bool,
    engine: Engine,
) -> None:
    """Print what is to run, and what of it will probably fail; raises UserError where the disk has no room for it."""
    from tpme.bench.run.preflight import check_disk, memory_warnings

    missing = [job for job, result in zip(jobs, latest, strict=True) if not is_finished(result, job)]
    if engine.here or engine.shared:
        check_disk(missing, metas)
    state = remaining(jobs, latest, run)
    if rows:
        screen.console.print(remaining_table(state))
    for sentence in (state.text, *(memory_warnings(missing, metas) if engine.here else ())):
        screen.print(sentence)


def _tell_damage(attempt: Latest, screen: Screen) -> None:
    if attempt.damage is not None:
        screen.print(f"{attempt.damage}; its cell is measured again")


def _write_matrix(run: Path, matrix: MatrixFile, jobs: Sequence[Job]) -> None:
    """Write what this folder runs now: ``matrix.json``, and the names of its cell folders, ``cells.json``.

    Reports show these cells; the folders of earlier matrices and versions stay where they are.
    """
    names = list(dict.fromkeys(job.folder.name for job in jobs))
    write_atomically(run / CELLS_FILE, (json.dumps({"cells": names}, indent=1) + "\n").encode())
    write_atomically(run / "matrix.json", without_home(matrix.model_dump_json(indent=1) + "\n").encode())


@contextlib.contextmanager
def locked_run(run: Path, shared: bool = False) -> Iterator[int]:
    """Lock the run folder, and clear away what a killed launcher left; yields the open lock file.

    A second launcher would run the same cells. The lock ends with this process and the cell that it runs. With
    ``shared`` cells on other machines write into the folder, and what they do there is left alone.
    """
    make_folder(run)
    path = run / ".lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        if not _acquire(lock, path):
            raise UserError(f"{run}: another 'tpme run' is using it; wait for it, or choose another folder")
        with _owned_run(run, shared):
            if not shared:
                refuse_jobs_in_slurm(run)
                end_orphans(lock)
                _sweep(run)
            yield lock
    finally:
        os.close(lock)


@contextlib.contextmanager
def _owned_run(run: Path, shared: bool) -> Iterator[None]:
    """Keep launchers on other machines away from the run folder; raises UserError where one has it."""
    try:
        with owned(run / ".owner", force=shared):
            yield
    except OwnedError as error:
        raise UserError(f"{run}: another 'tpme run' is using it. {error}") from None


def _acquire(lock: int, path: Path) -> bool:
    """Whether this process now holds the lock; that of a cell whose launcher was killed is free in a moment."""
    until_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from None
            return True
        else:
            return True


def _sweep(run: Path) -> None:
    """Remove what attempts of a killed launcher left in their folders: hidden files and files of jobs."""
    for folder in (path for path in run.glob("cells/*") if not path.is_symlink()):
        for path in (*folder.glob(".*attempt-*"), *folder.glob("attempt-*.job.json")):
            path.unlink(missing_ok=True)
