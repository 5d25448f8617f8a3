"""Replaces what of a launcher needs torch: the list of its jobs and the checks before they run. The rest is real."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tpme.bench.record import (
    Cell,
    CellResult,
    DatasetFacts,
    Environment,
    Epoch,
    Memory,
    Parameters,
    Phase,
    Reading,
    cell_id,
)
from tpme.bench.run import attempt, launch
from tpme.bench.run.job import Job

HERE = Path(__file__).parent
CODE = "c0ffee123456"
USERS, ITEMS = 20, 30


def arrays(seed: int) -> dict[str, dict[str, Any]]:
    """Ranks and samples of a cell, the same for the same seed."""
    random = np.random.default_rng(seed)
    return {
        "samples": {
            "step_s": np.full(8, 0.01),
            "step_epoch": np.repeat(np.arange(1, 5, dtype=np.int32), 2),
            "sample_t_s": np.arange(4) * 0.02,
            "sample_bytes": np.full(4, 1e6),
        },
        "ranks": {
            "rank": random.integers(1, ITEMS, USERS).astype(np.int32),
            "target": random.integers(1, ITEMS, USERS).astype(np.int32),
            "cold": np.zeros(USERS, bool),
            "in_history": np.zeros(USERS, bool),
        },
    }


def result(job: Job) -> CellResult:
    """A record as a cell that trained for four epochs leaves it, without its files."""
    none, host = Reading.missing("not measured", "stub"), Reading(value=1e6, source="stub")
    memory = Memory(
        torch_allocated_bytes=none,
        torch_reserved_bytes=none,
        nvml_device_bytes=none,
        nvml_process_bytes=none,
        host_rss_bytes=host,
    )
    return CellResult(
        cell_id=job.cell_id,
        attempt=1,
        cell=job.cell,
        code_version=job.code_version,
        status="ok",
        started_at="2026-01-01T00:00:00+00:00",
        wall_s=2.5,
        time_limit_s=job.time_limit_s,
        environment=Environment(
            python="3", platform="any", hostname_hash="0", packages={}, device_kind="cpu", device_name="any",
            device_key="any CPU, 1 threads", driver=None, cpu_threads=1, allocator="any", deterministic=False,
            git_revision=None, git_dirty=None,
        ),
        dataset=DatasetFacts(
            name=job.cell.dataset, fingerprint=job.cell.dataset_fingerprint, users=USERS, items=ITEMS,
            interactions=200, items_never_trained=0, modalities=job.cell.modalities,
        ),
        parameters=Parameters(trainable=10, trainable_max=10, total=20, by_group={"recommender": 5}, stored_bytes=40),
        phases=tuple(
            Phase(kind="train", name=f"epoch {n}", start_s=0.5 * n, wall_s=0.5, memory=memory, energy_j=none)
            for n in range(1, 5)
        ),
        epochs=tuple(
            Epoch(index=n, train_s=0.5, steps=2, loss=1.0 / n, valid_recall_10=0.1, valid_ndcg_10=0.05)
            for n in range(1, 5)
        ),
        warmup_epochs=1,
        best_epoch=1,
        epoch_time_s=Reading(value=0.5, source="stub"),
        training_memory=memory,
    )  # fmt: skip


def provide(job: Job) -> None:
    """What the stub of a cell writes, ready: its imports would take most of an injection's time."""
    folder = Path(os.environ["STUB_FILES"]) / job.cell_id
    if folder.exists():
        return
    made = folder.with_name(f"{folder.name}.{os.getpid()}")
    made.mkdir(parents=True)
    for name, values in arrays(job.cell.seed).items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **values)
        (made / f"{name}.npz").write_bytes(buffer.getvalue())
    (made / "json").write_text(result(job).model_dump_json())
    try:
        made.rename(folder)
    except OSError:  # another launcher was first
        return


def make_jobs(matrix: Any, run: Path, store: Path, *, time_limit_s: float | None = None, **_: Any) -> list[Job]:
    """A job for each method and seed; a cell's options say what its stub does."""
    jobs = []
    for entry in matrix.methods:
        for seed in matrix.seeds:
            cell = Cell(
                method=entry.name, cached=entry.cached is True, dataset="stub", dataset_fingerprint="0" * 64,
                modalities=("text",), seed=seed, matrix=matrix.name, options=entry.options,
            )  # fmt: skip
            identity = cell_id(cell, CODE)
            jobs.append(
                Job(
                    cell=cell,
                    cell_id=identity,
                    code_version=CODE,
                    dataset_path=store,
                    store=store,
                    folder=run / "cells" / f"{launch.slug(cell)}-{identity}",
                    cache_limit_bytes=matrix.cache_limit_bytes,
                    time_limit_s=time_limit_s or matrix.time_limit_s,
                )
            )
    for job in jobs:
        provide(job)
    return jobs


def announce(jobs: Any, latest: Any, run: Path, *others: Any, **_: Any) -> None:
    """What is still to run, without a look at the machine."""
    screen = others[-1]
    screen.print(launch.remaining(jobs, latest, run).text)


def install() -> None:
    """From now on launchers run stubs."""
    launch.MetaCells = lambda *_: None  # it loads torch
    launch.make_jobs = make_jobs
    launch._announce = announce
    attempt.command = lambda job_file, _python, *_: [sys.executable, "-P", str(HERE / "stub_cell.py"), str(job_file)]
