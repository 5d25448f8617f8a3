"""The feature cache: hidden states of an unmodified encoder, computed once for all items and read by training.

Any encoder that a method leaves frozen can be cached. A separate process (``bench/train/feature_builder.py``)
builds the cache, so the cell that trains on it never loads the encoder. Only the states that are read are stored, in
half precision. An interrupted build is resumed; a finished cache has checksums, which are verified on loading.

A cache is a folder for one encoder, with ``states.npy`` (N+1, levels, width) float16, row 0 zeros, and
``manifest.json``, written last. Where every token is read, states are (N+1, levels, T, width), and ``mask.npy``
(N+1, T) holds which tokens are real. ``initial-HASH.safetensors`` holds the tensors of a method whose item encoder
starts from the encoder's weights; methods that read the same states share the rest. Until the cache is finished,
``progress.json`` holds the number of rows synced to disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.measure.host import HostMemory
from tpme.bench.measure.torch_memory import peaks, reset_peaks
from tpme.bench.parsing import read_json_bytes
from tpme.bench.record import EncoderFacts, EncoderSpec, Frozen, Modality, Reading
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import Encoder, encoder_digest, load_encoder
from tpme.bench.task.evaluate import ITEMS_PER_CHUNK
from tpme.bench.task.feature_files import Tables, forget_progress, locked
from tpme.bench.task.fingerprint import is_unchanged, sha256_of
from tpme.bench.task.items import Reads, States, TokenStates, map_tensors, named_tensors, size_bytes
from tpme.bench.task.tokens import tokenise
from tpme.bench.task.view import EncoderView
from tpme.bench.writing import write_atomically

DTYPE = torch.float16
_SOURCES = (
    "batches.py",
    "checkpoints.py",
    "encoders.py",
    "families.py",
    "feature_files.py",
    "features.py",
    "items.py",
    "masks.py",
    "pooling.py",
    "tokens.py",
    "view.py",
)
"""The code that determines the hidden states: a change of it makes another cache."""


InitialState = Callable[[EncoderView], Mapping[str, Tensor]]
"""Tensors of an item encoder, by name, from the weights of one encoder."""


class InitialJob(Frozen):
    """The method whose item encoder starts from the encoder's weights: what its initial tensors depend on."""

    method: str
    options: dict[str, Any]
    methods_path: tuple[Path, ...]
    code_version: str

    @property
    def file(self) -> str:
        """The name of its file in the folder of a cache."""
        identity = json.dumps(self.model_dump(mode="json", exclude={"methods_path"}), sort_keys=True)
        return f"initial-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"


class FeatureJob(Frozen):
    """The settings of a cache, which determine its content and identity."""

    dataset: Path
    store: Path
    modality: Modality
    encoder: EncoderSpec
    reads: Reads
    """The hidden states kept."""
    title_tokens: int
    device: str
    seed: int
    limit_bytes: int
    initial: InitialJob | None = None
    """Stored in the cache, and no part of its identity."""


class FeatureManifest(Frozen):
    """The content of a finished cache's ``manifest.json``."""

    build_s: float
    bytes: int
    items: int
    dtype: str
    encoder: EncoderFacts
    """As loaded by the builder, with its revision."""
    sha256: dict[str, str]
    """Of each file."""
    initial_s: dict[str, float] = {}
    """Seconds that each file of initial tensors took."""
    peak_bytes: Reading
    """Peak memory of the process that finished it, over what it held before it loaded the encoder."""
    started_anew: bool = False
    """An interrupted build had left files that were damaged."""


def feature_folder(job: FeatureJob, fingerprint: str) -> Path:
    """Folder of the cache of ``job`` on the data set with ``fingerprint``, named by a hash of all its inputs."""
    encoder = job.encoder
    identity = {
        "dataset": fingerprint,
        "modality": job.modality,
        # Where it lies is no part of its content, and how it is pooled is one of the reads.
        "encoder": [encoder_digest(encoder), encoder.model_dump(exclude={"source", "revision", "pool"})],
        "reads": dataclasses.asdict(job.reads),
        "title_tokens": job.title_tokens if job.modality == "text" else None,
        "seed": job.seed if encoder.weights == "random" else None,
        "dtype": str(DTYPE),
        "transformers": version("transformers"),
        "code": [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in _SOURCES],
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return job.store / "features" / name


def planned_bytes(items: int, row: States) -> int:
    """Size of a cache on disk: N+1 times the states of one item, ``row``."""
    return (items + 1) * size_bytes(row)


def read_manifest(folder: Path) -> FeatureManifest | None:
    """The manifest of a finished cache; ``None`` if there is none yet, or it is damaged."""
    try:
        return FeatureManifest.model_validate_json(read_json_bytes(folder / "manifest.json"), strict=True)
    except (FileNotFoundError, UserError, ValidationError):
        return None


def is_built(job: FeatureJob, folder: Path) -> bool:
    """Whether nothing of what ``job`` asks for is missing in ``folder``."""
    manifest = read_manifest(folder)
    return manifest is not None and (job.initial is None or job.initial.file in manifest.initial_s)


def is_damaged(folder: Path) -> bool:
    """Whether a cache was finished there, and its manifest is not readable any more."""
    return (folder / "manifest.json").exists() and read_manifest(folder) is None


def build(
    job: FeatureJob,
    tick: Callable[[float], None] = lambda _share: None,
    initial_state: InitialState | None = None,
) -> FeatureManifest:
    """Build the cache of ``job``, or resume an interrupted build; returns the manifest of the finished cache.

    A finished cache that was damaged since is built again. One process at a time builds a cache; others wait for it.

    Args:
        job: what to build. tick: called with the share of the items that is done.
        initial_state: gives the tensors of ``job.initial``.

    Raises UserError if its size exceeds the limit or the free disk space, or if a hidden state is not finite in half
    precision.
    """
    dataset = Dataset.open(job.dataset, job.store)
    folder = feature_folder(job, dataset.manifest.fingerprint)
    with locked(folder):
        manifest, encoder = read_manifest(folder), None
        if manifest is None or damaged_file(folder, manifest.sha256) is not None:
            manifest, encoder = _build(job, dataset, folder, tick)
        if initial_state is None or is_built(job, folder):
            return manifest
        return _add_initial(job, manifest, folder, encoder or _load(job), initial_state)


def _load(job: FeatureJob) -> Encoder:
    device = torch.device(job.device)
    budget = weight_budget(device)
    return load_encoder(job.encoder, job.modality, device=device, seed=job.seed, max_host_bytes=budget)


def _build(
    job: FeatureJob, dataset: Dataset, folder: Path, tick: Callable[[float], None]
) -> tuple[FeatureManifest, Encoder]:
    started, items = time.perf_counter(), dataset.manifest.items
    device, host = torch.device(job.device), HostMemory()
    before = host.tree_bytes()
    host.start_window()
    reset_peaks(device)
    encoder = _load(job)
    store = _inputs(job, dataset)
    padding = _states(store, np.zeros(1, np.int64), encoder, job.reads, device)
    size = planned_bytes(items, padding)
    _check_size(size, job.limit_bytes, folder)
    named_tensors(padding)["states"].zero_()
    with Tables(folder, items + 1, _arrays(padding)) as tables:
        while tables.rows <= items:
            ids = np.arange(tables.rows, min(tables.rows + ITEMS_PER_CHUNK, items + 1), dtype=np.int64)
            tables.append(_arrays(_states(store, ids, encoder, job.reads, device)))
            tables.save_if_due(time.perf_counter() - started)
            tick(float(ids[-1]) / items)
        tables.save(time.perf_counter() - started)
    host.end_window()
    held = host.peak()
    resident = Reading(value=held.bytes - before, source=f"{held.source}, over the baseline")
    manifest = FeatureManifest(
        build_s=tables.spent_s,
        bytes=size,
        items=items,
        dtype=str(DTYPE).removeprefix("torch."),
        encoder=encoder.facts,
        sha256={tables.paths[name].name: digest for name, digest in tables.digests().items()},
        peak_bytes=peaks(device)[1] if device.type == "cuda" else resident,
        started_anew=tables.started_anew,
    )
    write_atomically(folder / "manifest.json", manifest.model_dump_json(indent=1).encode())
    forget_progress(folder)
    return manifest, encoder


def _add_initial(
    job: FeatureJob, manifest: FeatureManifest, folder: Path, encoder: Encoder, initial_state: InitialState
) -> FeatureManifest:
    """Store the initial tensors of ``job`` beside the states."""
    assert job.initial is not None
    started, file = time.perf_counter(), job.initial.file
    state = initial_state(encoder.view)
    if any(value.is_meta for value in state.values()):
        raise UserError(
            f"encoder '{encoder.facts.source}': it is read from disk layer by layer, because it does not fit into "
            f"memory, so method '{job.initial.method}' cannot start from its weights; choose a smaller encoder"
        )
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    write_atomically(folder / file, save(tensors))
    added = {
        "sha256": manifest.sha256 | {file: sha256_of(folder / file)},
        "initial_s": manifest.initial_s | {file: time.perf_counter() - started},
    }
    manifest = manifest.model_copy(update=added)
    write_atomically(folder / "manifest.json", manifest.model_dump_json(indent=1).encode())
    return manifest


def weight_budget(device: torch.device) -> int:
    """Bytes that an encoder's weights may take; a larger one is read from disk layer by layer for every chunk."""
    import psutil

    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return int(free * 0.8)


def _inputs(job: FeatureJob, dataset: Dataset) -> ItemStore:
    if job.modality == "image":
        return ItemStore(dataset, images=True)
    encoder = job.encoder
    return ItemStore(dataset, tokens=tokenise(dataset, encoder.source, encoder.revision, job.title_tokens, job.store))


@torch.no_grad()
def _states(store: ItemStore, ids: NDArray[np.int64], encoder: Encoder, reads: Reads, device: torch.device) -> States:
    """The states of items ``ids`` (n,) in half precision, on the host."""
    items = store.gather(ids).to(device)
    states = encoder.view.encode(reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image)
    half = map_tensors(states, lambda tensor: tensor.to(DTYPE) if tensor.is_floating_point() else tensor)
    if not all(bool(tensor.isfinite().all()) for tensor in named_tensors(half).values()):
        raise UserError(
            f"encoder '{encoder.facts.source}': a hidden state is not finite in half precision, so it cannot be "
            "cached; remove cached = true"
        )
    return map_tensors(half, lambda tensor: tensor.cpu())


def _arrays(states: States) -> dict[str, NDArray[np.generic]]:
    return {name: tensor.numpy() for name, tensor in named_tensors(states).items()}


class DamagedCacheError(UserError):
    """A finished cache of which a file was changed or removed."""


def open_cache(folder: Path) -> States:
    """Verify a finished cache and map its tables into memory: (N+1, levels, width) float16, or those of every token.

    Raises DamagedCacheError if a checksum does not match.
    """
    names = [name for name in _finished(folder).sha256 if name.endswith(".npy")]
    tables = {name: torch.from_numpy(np.load(_verified(folder, name), mmap_mode="c")) for name in names}
    forget_progress(folder)
    if len(tables) == 1:
        return tables["states.npy"]
    return TokenStates(tables["states.npy"], tables["mask.npy"])


def read_initial(folder: Path, initial: InitialJob) -> dict[str, Tensor]:
    """The initial tensors that a finished cache holds. Raises DamagedCacheError if the checksum does not match."""
    return load_file(_verified(folder, initial.file))


def _finished(folder: Path) -> FeatureManifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise DamagedCacheError(f"{folder}: no finished feature cache; run the cell again")
    return manifest


def _verified(folder: Path, name: str) -> Path:
    """The file ``name`` of a finished cache, if its checksum matches."""
    if damaged_file(folder, {name: _finished(folder).sha256.get(name, "")}) is not None:
        raise DamagedCacheError(f"{folder / name}: its checksum does not match; run the cell again")
    return folder / name


def damaged_file(folder: Path, digests: Mapping[str, str]) -> str | None:
    """The first of these files, by name, that is missing or has another SHA-256; ``None`` where all are whole."""
    for name, digest in digests.items():
        path = folder / name
        memory = folder / f"{name}.checked"
        if not path.is_file() or not is_unchanged([path], digest, partial(sha256_of, path), memory):
            return name
    return None


def _check_size(size: int, limit: int, folder: Path) -> None:
    written = sum(path.stat().st_size for path in folder.glob("*.npy"))
    free = shutil.disk_usage(folder).free + written
    if size > min(limit, free):
        bound = "the limit (cache_limit_bytes)" if limit < free else f"the free disk space of {folder}"
        raise UserError(f"the feature cache needs {size:,} bytes, more than {bound}, {min(limit, free):,}")
