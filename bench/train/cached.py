"""Training on cached hidden states: the feature cache of a cell, built by a separate process if it is missing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpme.bench.errors import UserError
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import CacheFacts
from tpme.bench.task.batches import States
from tpme.bench.task.features import FeatureJob, Placement, feature_folder, load, read_manifest
from tpme.bench.workers import parse_progress

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class CachedStates:
    """Hidden states of all items, where they are kept, and the facts about their cache."""

    states: States
    placement: Placement
    facts: CacheFacts


def cached_states(job: FeatureJob, fingerprint: str, phases: PhaseLog, progress: Progress) -> CachedStates:
    """The cached states of ``job`` on the data set with ``fingerprint``; they are built first where they are missing.

    Raises UserError where the cache cannot be built, would be too large, or is damaged.
    """
    folder = feature_folder(job, fingerprint)
    manifest = read_manifest(folder)
    missing = manifest is None
    if missing:
        with phases.phase("cache"):
            _build(job, progress)
        manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: the feature cache was built but is missing; run the cell again")
    with phases.phase("load", "cache"):
        progress("load the feature cache", 0.0)
        states, placement = load(folder, torch.device(job.device))
    facts = CacheFacts(
        build_s=manifest.build_s,
        bytes=manifest.bytes,
        items=manifest.items,
        dtype=manifest.dtype,
        built_by_attempt=missing,
        encoders=manifest.encoders,
        peak_bytes=manifest.peak_bytes,
    )
    return CachedStates(states, placement, facts)


def _build(job: FeatureJob, progress: Progress) -> None:
    """Run the builder; its output goes to this process's standard error, the last line of a failure into UserError."""
    command = [sys.executable, "-P", "-m", "tpme.bench.task.features", job.model_dump_json()]
    # A file, because a pipe that is not read would block a builder with much output.
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for event in filter(None, map(parse_progress, process.stdout)):
                    progress(*event)
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        output = log.read()
    sys.stderr.write(output)
    if process.returncode < 0:
        raise UserError(f"building the feature cache failed: its process was ended by signal {-process.returncode}")
    if process.returncode:
        lines = output.strip().splitlines()
        last = lines[-1].removeprefix("tpme: ") if lines else f"exit code {process.returncode}"
        raise UserError(f"building the feature cache failed: {last}")
