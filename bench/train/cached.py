"""Training on stored hidden states: precomputed ones, and feature caches, which separate processes build first."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import CacheFacts, CachePart, Modality
from tpme.bench.task.features import (
    DamagedCacheError,
    FeatureJob,
    FeatureManifest,
    feature_folder,
    is_built,
    is_damaged,
    open_cache,
    read_initial,
    read_manifest,
)
from tpme.bench.task.placement import ItemShard, Placement, Table, place
from tpme.bench.task.precomputed import MappedStates
from tpme.bench.train.ranks import Ranks
from tpme.bench.workers import parse_progress

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class StoredStates:
    """Hidden states of all items by modality, where they are kept, and the facts about their cache.

    initial: parameters of the item encoder that start from the weights of the cached encoders. rebuilt: whose cache was
    damaged on disk, and built again.
    """

    tables: dict[Modality, Table | ItemShard]
    placement: Placement
    cache: CacheFacts | None
    initial: dict[str, Tensor]
    rebuilt: tuple[Modality, ...] = ()


def stored_states(
    jobs: Sequence[FeatureJob],
    given: Mapping[Modality, MappedStates],
    fingerprint: str,
    device: torch.device,
    phases: PhaseLog,
    progress: Progress,
    ranks: Ranks | None = None,
) -> StoredStates:
    """The states that are not computed in every step.

    Args:
        jobs: a feature cache per encoder; one that is missing or damaged is built first. given: precomputed states.
        fingerprint: of the data set. device: of the training. ranks: that train together; rank 0 builds for all.

    Raises UserError where a cache cannot be built, or would be too large.
    """
    ranks = ranks or Ranks.alone()
    folders = {job.modality: feature_folder(job, fingerprint) for job in jobs}
    if ranks.rank > 0:
        ranks.wait()
    missing = [job for job in jobs if not is_built(job, folders[job.modality])]
    damaged = [job for job in missing if is_damaged(folders[job.modality])]
    built: set[Modality] = set()
    while True:
        for job in missing:
            with phases.phase("cache", job.modality):
                build_cache(job, progress)
        built |= {job.modality for job in missing}
        with phases.phase("load", "cache" if jobs else "states"):
            progress("load the states", 0.0)
            cached, initial, missing = _open(jobs, folders)
            if not missing:
                if ranks.rank == 0:
                    ranks.wait()  # until the others are here, too; all then read at once
                tables, placement = place({**given, **cached}, device, ranks.peers)
                break
        if not built.isdisjoint(job.modality for job in missing):
            raise UserError(f"{folders[missing[0].modality]}: damaged again as soon as it was built; check the disk")
        damaged += missing
    manifests = {m: manifest for m, folder in folders.items() if (manifest := read_manifest(folder)) is not None}
    anew = [job for job in jobs if job.modality in built and manifests[job.modality].started_anew]
    damaged += [job for job in anew if job not in damaged]
    initial_s = {job.modality: manifests[job.modality].initial_s[job.initial.file] for job in jobs if job.initial}
    return StoredStates(
        tables,
        placement,
        _facts(manifests, built, initial_s) if manifests else None,
        initial,
        tuple(job.modality for job in damaged),
    )


def _open(
    jobs: Sequence[FeatureJob], folders: Mapping[Modality, Path]
) -> tuple[dict[Modality, Table], dict[str, Tensor], list[FeatureJob]]:
    """The states and initial tensors of finished caches, and those that are damaged."""
    tables: dict[Modality, Table] = {}
    initial: dict[str, Tensor] = {}
    damaged = []
    for job in jobs:
        try:
            tables[job.modality] = open_cache(folders[job.modality])
            initial |= {} if job.initial is None else read_initial(folders[job.modality], job.initial)
        except DamagedCacheError:
            damaged.append(job)
    return tables, initial, damaged


def _facts(
    manifests: Mapping[Modality, FeatureManifest], built: Collection[Modality], initial_s: Mapping[Modality, float]
) -> CacheFacts:
    """The facts about the caches of several encoders.

    ``built`` are those that this attempt built, ``initial_s`` the seconds for the initial tensors of its method.
    """
    parts = {
        modality: CachePart(
            build_s=manifest.build_s + initial_s.get(modality, 0.0),
            bytes=manifest.bytes,
            built_by_attempt=modality in built,
        )
        for modality, manifest in manifests.items()
    }
    any_of = next(iter(manifests.values()))
    return CacheFacts(
        build_s=sum(part.build_s for part in parts.values()),
        bytes=sum(part.bytes for part in parts.values()),
        items=any_of.items,
        dtype=any_of.dtype,
        built_by_attempt=bool(built),
        encoders={modality: manifest.encoder for modality, manifest in manifests.items()},
        peak_bytes=max((manifest.peak_bytes for manifest in manifests.values()), key=lambda peak: peak.value or 0.0),
        parts=parts,
    )


def build_cache(job: FeatureJob, progress: Progress) -> None:
    """Run the builder of a feature cache, whose output goes to this process's standard error.

    Raises UserError with the last line of it where that fails.
    """
    command = [sys.executable, "-P", "-m", "tpme.bench.train.feature_builder", job.model_dump_json(), str(os.getpid())]
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
