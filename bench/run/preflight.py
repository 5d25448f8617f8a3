"""What the data and this machine must offer a matrix, checked before its first cell runs.

``cell_checks`` holds what a matrix asks of its methods and encoders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

from tpme.bench.counting.exact import count, planned_peak, run_step
from tpme.bench.counting.meta import MetaCell, MetaEncoders
from tpme.bench.counting.rank_step import count_rank
from tpme.bench.errors import UserError
from tpme.bench.measure.nvml import Nvml, NvmlError
from tpme.bench.record import Cell, EncoderSpec
from tpme.bench.run.cell_checks import MetaCells, cost_key
from tpme.bench.run.inputs import feature_job
from tpme.bench.run.job import Job
from tpme.bench.task.checkpoints import check_weights, checkpoint_folder
from tpme.bench.task.dataset import Dataset, Titles
from tpme.bench.task.features import FeatureJob, feature_folder, is_built
from tpme.bench.task.tokens import tokenise
from tpme.bench.train.build import EncoderUse
from tpme.methods.registry import blaming, create

WORTH_PLANNING = 1e-3
"""Share of the memory that a cell's weights must take before its step is planned: one of tiny encoders surely fits."""


def check_inputs(
    cells: Iterable[Cell],
    folders: Mapping[str, Path],
    metas: MetaCells,
    *,
    without: Collection[str] = (),
) -> None:
    """Check that every encoder that is to run can be read, and reads the images and titles of its data set.

    Args:
        cells: of a matrix. folders: of each prepared data set, by name. metas: where configurations come from.
        without: sources of encoders of which only the configuration is known, not the files.

    Raises UserError where one cannot be read, or does not fit.
    """
    seen = set()
    for cell in {cost_key(cell): cell for cell in cells}.values():
        with blaming(cell.method):
            use = EncoderUse.of(cell, create(cell.method, cell.options, metas.methods_path))
        for modality, spec in {**use.run, **use.cached}.items():
            key = (cell.dataset, modality, spec.model_dump_json(), cell.training.title_tokens)
            if key in seen or cell.dataset not in folders:
                continue
            seen.add(key)
            dataset, known = Dataset.open(folders[cell.dataset]), spec.source not in without
            if known:
                _check_weights(spec)
            if modality == "image":
                _check_images(cell.dataset, dataset, spec, metas.encoders)
            elif known:
                _check_titles(dataset, spec, cell.training.title_tokens)


def _check_weights(spec: EncoderSpec) -> None:
    """Raise UserError where a pretrained encoder's folder has no weights to be read, or its repository is not there."""
    folder, commit = checkpoint_folder(spec)
    if commit is None and spec.weights == "pretrained":
        check_weights(spec, folder)


def _check_images(name: str, dataset: Dataset, spec: EncoderSpec, encoders: MetaEncoders) -> None:
    size = encoders.view(spec, "image").config.image_size
    sides = {size} if isinstance(size, int) else set(size)
    stored = dataset.manifest.image_size
    if sides != {stored}:
        reads = " x ".join(map(str, sorted(sides)))
        raise UserError(
            f"data set '{name}': its images are {stored} pixels wide, but the encoder '{spec.source}' reads {reads}; "
            f"choose an encoder of that size, or prepare the data with --image-size {max(sides)} (image_size = "
            f"{max(sides)} in [[datasets]] for the built-in catalogue)"
        )


def _check_titles(dataset: Dataset, spec: EncoderSpec, title_tokens: int) -> None:
    """Tokenise a title as a cell would. Raises UserError where that is not possible."""
    if dataset.titles is not None:  # all of them would take a while
        dataset.titles = Titles(np.frombuffer(b"title", np.uint8), np.array([0, 0, 5]))
    tokenise(dataset, spec.source, spec.revision, title_tokens, store=None)


# --- the machine -----------------------------------------------------------------------------------------------------


def check_disk(jobs: Sequence[Job], metas: MetaCells) -> None:
    """Raise UserError where the store has no room for the feature caches that ``jobs``, about to run, build."""
    caches: dict[Path, tuple[str, int]] = {}
    for job in {cost_key(job.cell): job for job in jobs if job.cell.cached}.values():
        if meta := metas.built(job.cell):
            caches |= _missing_bytes(job, meta)
    needed = sum(size for _, size in caches.values())
    if not needed:
        return
    place = next(path for path in (jobs[0].store, *jobs[0].store.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        largest = sorted(caches.values(), key=lambda cache: -cache[1])[:3]
        which = ", ".join(f"{label} {size:,}" for label, size in largest)
        raise UserError(
            f"{jobs[0].store}: the feature caches to be built need {needed:,} bytes there (most: {which}), and "
            f"{free:,} are free; make room, choose another --store, or remove cached = true"
        )


def memory_warnings(jobs: Sequence[Job], metas: MetaCells) -> list[str]:
    """A sentence for every row of ``jobs``, all of one device, that will probably run out of memory.

    Such a row is not refused, because running out of memory is a result, too.
    """
    memory, name = device_memory(jobs[0].cell.device) if jobs else (None, "")
    if memory is None:
        return []
    built = (metas.built(job.cell) for job in {cost_key(job.cell): job for job in jobs}.values())
    needed = [(meta.cell.label, _planned_bytes(meta, memory)) for meta in built if meta is not None]
    return [memory_warning(label, size, memory, name) for label, size in needed if size > memory]


def memory_warning(label: str, needed: int, memory: int, name: str) -> str:
    """The warning about a row whose planned tensors take more than the ``memory`` of the device ``name``."""
    return (
        f"{label} will probably run out of memory: its tensors alone are planned to take {needed / 1e9:.1f} GB, and "
        f"{name} has {memory / 1e9:.1f} GB."
    )


def device_memory(device: str) -> tuple[int | None, str]:
    """Memory in bytes of the device that cells run on, and its name; ``None`` where NVML cannot read it.

    CUDA is left alone: a context of this process would be another process on the GPU of the cells.
    """
    if device == "cpu":
        return psutil.virtual_memory().total, "this machine"
    nvml = Nvml.open()
    try:
        gpu = nvml.select(0, None, os.environ)
        return gpu.memory().total, f"the GPU ({gpu.name})"
    except NvmlError:
        return None, ""
    finally:
        nvml.close()


def _planned_bytes(meta: MetaCell, memory: int) -> int:
    """Planned peak of a training step; of a model that is small beside ``memory`` its weights alone.

    Of several devices: on each GPU, and on the CPU, whose memory they share, of all of them.
    """
    devices = meta.cell.training.devices
    sharing = 1 if meta.cell.device == "cuda" else devices
    weights = [*meta.model.parameters(), *meta.model.buffers()]
    held = sharing * sum(tensor.numel() * tensor.element_size() for tensor in weights)
    if held < WORTH_PLANNING * memory:
        return held
    counts = count(meta)
    if devices == 1:
        return planned_peak(counts, run_step(meta, fused_attention=True), memory, workspace_bytes=0)
    own = memory // sharing
    return sharing * count_rank(meta, counts, devices, memory_bytes=own, workspace_bytes=0).peak_bytes


def missing_caches(job: Job, meta: MetaCell) -> dict[Path, FeatureJob]:
    """Feature caches of a cell that are not built, by their folders."""
    return {folder: cache for folder, cache in feature_jobs(job, meta).items() if not is_built(cache, folder)}


def feature_jobs(job: Job, meta: MetaCell) -> dict[Path, FeatureJob]:
    """Feature caches that a cell trains on, by their folders."""
    caches = [
        feature_job(job, meta.method, modality, spec, meta.model.item_encoder.reads[modality])
        for modality, spec in meta.use.cached.items()
    ]
    return {feature_folder(cache, job.cell.dataset_fingerprint): cache for cache in caches}


def _missing_bytes(job: Job, meta: MetaCell) -> dict[Path, tuple[str, int]]:
    """The folders of ``missing_caches`` -> label, and bytes still to be written."""
    missing = {}
    for folder, cache in missing_caches(job, meta).items():
        written = sum(path.stat().st_size for path in folder.glob("*.npy"))
        label = f"{job.cell.label} {cache.modality}"
        missing[folder] = label, max(0, meta.cache_bytes[cache.modality] - written)
    return missing
