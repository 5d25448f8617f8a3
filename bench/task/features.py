"""The feature cache: hidden states of untouched encoders, computed once for all items, read by training.

Any decoupled method gets its cached twin from here. The cache is built by a process of its own
(``python -m tpme.bench.task.features JOB``), so the cell that trains on it never loads the encoders. Only the states
that are read are kept, in half precision by default. Building goes on where an interrupted one stopped; a finished
cache carries checksums, and is verified when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Frozen, Modality, write_atomically
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import encoder_digest, load_encoder
from tpme.bench.task.evaluate import ITEMS_PER_CHUNK
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.tokens import tokenise

FLUSH_EVERY_CHUNKS = 16
DTYPE: Literal["float16"] = "float16"


class FeatureJob(Frozen):
    """What a cache holds, and with it its identity."""

    dataset: Path
    store: Path
    encoders: dict[Modality, EncoderSpec]
    levels: dict[Modality, tuple[int, ...]]
    final: dict[Modality, bool]
    title_tokens: int
    device: str
    seed: int
    limit_bytes: int

    def reads(self, modality: Modality) -> Reads:
        """What is kept of one encoder."""
        return Reads(self.levels[modality], self.final[modality])


class FeatureManifest(Frozen):
    """A finished cache."""

    build_s: float
    bytes: int
    items: int
    dtype: str
    sha256: dict[Modality, str]


def feature_folder(job: FeatureJob, fingerprint: str) -> Path:
    """Where the cache of ``job`` on the data set with ``fingerprint`` lies: named by all that it depends on."""
    depends = {
        "dataset": fingerprint,
        "encoders": {m: [encoder_digest(spec), spec.weights] for m, spec in job.encoders.items()},
        "levels": job.levels,
        "final": job.final,
        "title_tokens": job.title_tokens,
        "seed": job.seed if any(spec.weights == "random" for spec in job.encoders.values()) else None,
        "dtype": DTYPE,
    }
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return job.store / "features" / name


def planned_bytes(items: int, shapes: Mapping[Modality, EncoderShape], reads: Mapping[Modality, Reads]) -> int:
    """Size of a cache on disk: (N+1) x levels x width x 2 bytes, summed over modalities."""
    size = np.dtype(DTYPE).itemsize
    return sum((items + 1) * reads[m].count * shapes[m].width * size for m in reads)


def read_manifest(folder: Path) -> FeatureManifest | None:
    """The manifest of a finished cache, or ``None`` where there is none yet."""
    path = folder / "manifest.json"
    return FeatureManifest.model_validate_json(path.read_bytes()) if path.is_file() else None


def build(job: FeatureJob, tick: Callable[[float], None] = lambda _share: None) -> FeatureManifest:
    """Build the cache of ``job``, or go on with a part of it; returns the manifest of the finished cache.

    Raises UserError where its planned bytes exceed the limit or the free disk.
    """
    dataset = Dataset.open(job.dataset)
    folder = feature_folder(job, dataset.manifest.fingerprint)
    finished = read_manifest(folder)
    if finished:
        return finished
    started = time.perf_counter()
    device = torch.device(job.device)
    encoders = {m: load_encoder(spec, m, device=device, seed=job.seed) for m, spec in job.encoders.items()}
    reads = {m: job.reads(m) for m in job.encoders}
    size = planned_bytes(dataset.manifest.items, {m: e.view.shape for m, e in encoders.items()}, reads)
    _check_size(size, job.limit_bytes, job.store)
    text = job.encoders.get("text")
    tokens = tokenise(dataset, text.source, text.revision, job.title_tokens, job.store) if text else None
    store = ItemStore(dataset, tokens=tokens, images="image" in job.encoders)
    folder.mkdir(parents=True, exist_ok=True)
    shape = {m: (dataset.manifest.items + 1, reads[m].count, encoders[m].view.shape.width) for m in encoders}
    tables, done, spent = _open_tables(folder, shape)
    chunks = range(done, dataset.manifest.items + 1, ITEMS_PER_CHUNK)
    for number, start in enumerate(chunks, start=1):
        ids = np.arange(start, min(start + ITEMS_PER_CHUNK, dataset.manifest.items + 1), dtype=np.int64)
        items = store.gather(ids).to(device)
        for modality, encoder in encoders.items():
            with torch.no_grad():
                states = encoder.view.encode(
                    reads[modality], tokens=items.tokens, token_mask=items.token_mask, image=items.image
                )
            tables[modality][ids] = states.to(torch.float16).cpu().numpy()
        if number % FLUSH_EVERY_CHUNKS == 0:
            _save_progress(folder, tables, int(ids[-1]) + 1, spent + time.perf_counter() - started)
        tick(float(ids[-1]) / dataset.manifest.items)
    for table in tables.values():
        table.flush()
    manifest = FeatureManifest(
        build_s=spent + time.perf_counter() - started,
        bytes=size,
        items=dataset.manifest.items,
        dtype=DTYPE,
        sha256={m: _sha256(folder / f"{m}.npy") for m in tables},
    )
    write_atomically(folder / "manifest.json", manifest.model_dump_json(indent=1).encode())
    (folder / "progress.json").unlink(missing_ok=True)
    return manifest


def load(folder: Path, device: torch.device) -> tuple[dict[Modality, Tensor], str]:
    """Read a finished cache, verified; returns (N+1, levels, width) float16 by modality, and where they are kept.

    On the device when they fit into half of its free memory, else in host memory when they fit into half of what is
    available there, else the file is mapped. Raises UserError where a checksum does not match.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no finished feature cache; run the cell again")
    for modality, digest in manifest.sha256.items():
        path = folder / f"{modality}.npy"
        if _sha256(path) != digest:
            raise UserError(f"{path}: its checksum does not match; delete {folder} and run the cell again")
    placement = _placement(manifest.bytes, device)
    states: dict[Modality, Tensor] = {}
    for modality in manifest.sha256:
        table = np.load(folder / f"{modality}.npy", mmap_mode="c" if placement == "mapped" else None)
        tensor = torch.from_numpy(table)
        states[modality] = tensor.to(device) if placement == "device" else tensor
    return states, placement


def _placement(size: int, device: torch.device) -> str:
    import psutil

    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    return "host" if size <= psutil.virtual_memory().available // 2 else "mapped"


def _check_size(size: int, limit: int, store: Path) -> None:
    store.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store).free
    if size > min(limit, free):
        what = "the limit (cache_limit_bytes)" if limit < free else f"what is free on the disk of {store}"
        raise UserError(f"the feature cache would take {size:,} bytes, more than {what}, {min(limit, free):,}")


def _open_tables(
    folder: Path, shapes: dict[Modality, tuple[int, int, int]]
) -> tuple[dict[Modality, np.memmap], int, float]:
    """The tables, new or as an interrupted build left them; the first item still to do; the seconds spent so far."""
    progress = folder / "progress.json"
    state = json.loads(progress.read_bytes()) if progress.is_file() else None
    done, spent = (int(state["next_item"]), float(state["spent_s"])) if state else (1, 0.0)
    tables = {
        modality: np.lib.format.open_memmap(
            folder / f"{modality}.npy", mode="r+" if state else "w+", dtype=DTYPE, shape=shape
        )
        for modality, shape in shapes.items()
    }
    return tables, done, spent


def _save_progress(folder: Path, tables: Mapping[Modality, np.memmap], next_item: int, spent: float) -> None:
    for table in tables.values():
        table.flush()
    write_atomically(folder / "progress.json", json.dumps({"next_item": next_item, "spent_s": spent}).encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Build the cache that a job file describes; prints the share that is done, a line each."""
    job = FeatureJob.model_validate_json(Path(sys.argv[1]).read_bytes())
    try:
        build(job, lambda share: print(f"{share:.4f}", flush=True))  # noqa: T201
    except UserError as error:
        sys.exit(f"tpme: {error}")


if __name__ == "__main__":
    main()
