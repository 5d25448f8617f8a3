"""A published run as an ordinary record: what was not published is missing, with the reason.

Records of one import appear together or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tpme.bench.errors import UserError
from tpme.bench.record import (
    Cell,
    CellResult,
    Environment,
    Epoch,
    Failure,
    ImportSource,
    Memory,
    NamedMetric,
    Parameters,
    Reading,
    Status,
    cell_id,
    write_result,
)
from tpme.bench.task.workspace import publish, workspace

NOT_PUBLISHED = "not published"
EPOCH_OF_UNIX = "1970-01-01T00:00:00+00:00"
"""When a run started that does not say."""


@dataclass(frozen=True)
class Published:
    """What is known of one run; times in seconds, sizes in bytes."""

    where: str
    """File, or file and line, for messages."""
    task: str
    data: str
    method: str
    device_name: str
    source: ImportSource
    time_s: Reading
    memory: Memory
    metrics: dict[str, NamedMetric]
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    device: Literal["cpu", "cuda"] = "cuda"
    packages: dict[str, str] = field(default_factory=dict)
    platform: str = NOT_PUBLISHED
    seed: int = 0
    code_version: str = NOT_PUBLISHED
    started_at: str = EPOCH_OF_UNIX
    time_of: str = "epoch"
    epochs: tuple[Epoch, ...] = ()
    total_s: Reading | None = None
    wall_s: float = 0.0
    """0 where it was not published; reports then show none."""
    parameters: Parameters | None = None
    counters: dict[str, Reading] = field(default_factory=dict)
    status: Status = "ok"
    failure: Failure | None = None


def memory_of(**readings: Reading) -> Memory:
    """The memory that was published, by field of ``Memory``; every other instrument is missing."""
    missing = Reading.missing("none", NOT_PUBLISHED)
    return Memory(**(dict.fromkeys(Memory.model_fields, missing) | readings))


def record_of(run: Published) -> CellResult:
    """The record of a run."""
    cell = Cell(
        method=run.method,
        options=run.options,
        dataset=run.data,
        dataset_fingerprint=run.fingerprint,
        task=run.task,
        settings=run.settings,
        modalities=(),
        device=run.device,
        seed=run.seed,
    )
    return CellResult(
        cell_id=cell_id(cell, run.code_version),
        attempt=1,
        cell=cell,
        code_version=run.code_version,
        status=run.status,
        failure=run.failure,
        started_at=run.started_at,
        wall_s=run.wall_s,
        environment=Environment(
            python=run.packages.get("python", NOT_PUBLISHED),
            platform=run.platform,
            hostname_hash="",
            packages=run.packages,
            device_kind=run.device,
            device_name=run.device_name,
            device_key=run.device_name,
            driver=None,
            cpu_threads=0,
            allocator=NOT_PUBLISHED,
            deterministic=False,
            git_revision=None,
            git_dirty=None,
        ),
        parameters=run.parameters,
        epochs=run.epochs,
        epoch_time_s=run.time_s,
        time_of=run.time_of,
        all_in_s=run.total_s,
        training_memory=run.memory,
        counters=run.counters,
        metrics=run.metrics,
        source=run.source,
    )


def write_runs(runs: Sequence[Published], out: Path) -> None:
    """Write a record for each run below ``out``, as a run folder has them; all of them or none.

    Raises:
        UserError: ``out`` is there already, or two runs would be the same record.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: is there already; name a new folder, or delete it to import again")
    places: dict[str, str] = {}
    with workspace(out) as folder:
        for run in runs:
            record = record_of(run)
            if record.cell_id in places:
                raise UserError(
                    f"{run.where}: method, options, settings and seed are those of {places[record.cell_id]}; remove one"
                    ", or name what tells them apart"
                )
            places[record.cell_id] = run.where
            write_result(record, folder / "run" / "cells" / record.cell_id / "attempt-1.json")
        publish(folder / "run", out, replace=False)
