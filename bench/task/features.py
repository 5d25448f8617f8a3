"""The feature cache: hidden states of the unmodified encoders, computed once for all items and read by training.

Any decoupled method can train on it. A separate process (``python -m tpme.bench.task.features JOB``) builds the cache,
so the cell that trains on it never loads the encoders. Only the states that are read are stored, in half precision. An
interrupted build is resumed; a finished cache has checksums, which are verified on loading.

A cache is a folder with one ``.npy`` (N+1, levels, width) float16 per modality, row 0 zeros, and ``manifest.json``,
written last. Until then ``progress.json`` holds the number of rows synced to disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.measure.host import HostMemory
from tpme.bench.measure.torch_memory import peaks, reset_peaks
from tpme.bench.record import EncoderFacts, EncoderSpec, Frozen, Modality, Reading, write_atomically
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import Encoder, encoder_digest, encoder_shape, load_encoder
from tpme.bench.task.evaluate import ITEMS_PER_CHUNK
from tpme.bench.task.feature_files import DTYPE as DTYPE
from tpme.bench.task.feature_files import Tables, locked
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.tokens import tokenise
from tpme.bench.workers import progress_line

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

Placement = Literal["device", "pinned", "unpinned", "host", "mapped"]
PLACES: dict[Placement, str] = {
    "device": "GPU memory",
    "pinned": "page-locked host memory",
    "unpinned": "host memory, which could not be page-locked",
    "host": "host memory",
    "mapped": "a memory map of their files",
}
"""Location of cached states during training."""


class FeatureJob(Frozen):
    """The settings of a cache, which determine its content and identity."""

    dataset: Path
    store: Path
    encoders: dict[Modality, EncoderSpec]
    reads: dict[Modality, Reads]
    """The hidden states kept of each encoder."""
    title_tokens: int
    device: str
    seed: int
    limit_bytes: int


class FeatureManifest(Frozen):
    """The content of a finished cache's ``manifest.json``."""

    build_s: float
    bytes: int
    items: int
    dtype: str
    encoders: dict[Modality, EncoderFacts]
    """As loaded by the builder, with revisions."""
    sha256: dict[Modality, str]
    peak_bytes: Reading
    """Peak memory of the process that finished it, over what it held before it loaded the encoders."""


def feature_folder(job: FeatureJob, fingerprint: str) -> Path:
    """Folder of the cache of ``job`` on the data set with ``fingerprint``, named by a hash of all its inputs."""
    random = any(spec.weights == "random" for spec in job.encoders.values())
    identity = {
        "dataset": fingerprint,
        "encoders": {
            m: [encoder_digest(spec), spec.weights, spec.tower, spec.dtype, spec.attention]
            for m, spec in job.encoders.items()
        },
        "reads": {m: [reads.levels, reads.final, reads.pool, reads.tokens] for m, reads in job.reads.items()},
        "title_tokens": job.title_tokens if "text" in job.encoders else None,
        "seed": job.seed if random else None,
        "dtype": DTYPE,
        "transformers": version("transformers"),
        "code": [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in _SOURCES],
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return job.store / "features" / name


def planned_bytes(items: int, shapes: Mapping[Modality, EncoderShape], reads: Mapping[Modality, Reads]) -> int:
    """Size of a cache on disk: (N+1) x levels x width x 2 bytes, summed over modalities."""
    size = np.dtype(DTYPE).itemsize
    return sum((items + 1) * reads[m].count * shapes[m].width * size for m in reads)


def read_manifest(folder: Path) -> FeatureManifest | None:
    """The manifest of a finished cache; ``None`` if there is none yet. Raises UserError if it is damaged."""
    path = folder / "manifest.json"
    try:
        return FeatureManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise UserError(f"{path}: not readable; delete {folder} and run the cell again") from None


def build(job: FeatureJob, tick: Callable[[float], None] = lambda _share: None) -> FeatureManifest:
    """Build the cache of ``job``, or resume an interrupted build; returns the manifest of the finished cache.

    One process at a time builds a cache; others wait for it.

    Raises UserError if its size exceeds the limit or the free disk space, or if a hidden state is not finite in half
    precision.
    """
    dataset = Dataset.open(job.dataset)
    folder = feature_folder(job, dataset.manifest.fingerprint)
    with locked(folder):
        finished = read_manifest(folder)
        return finished if finished else _build(job, dataset, folder, tick)


def _build(job: FeatureJob, dataset: Dataset, folder: Path, tick: Callable[[float], None]) -> FeatureManifest:
    started, items = time.perf_counter(), dataset.manifest.items
    shapes = {m: encoder_shape(spec, m) for m, spec in job.encoders.items()}
    size = planned_bytes(items, shapes, job.reads)
    _check_size(size, job.limit_bytes, folder)
    device, host = torch.device(job.device), HostMemory()
    before = host.tree_bytes()
    host.start_window()
    reset_peaks(device)
    encoders = {m: load_encoder(spec, m, device=device, seed=job.seed) for m, spec in job.encoders.items()}
    text = job.encoders.get("text")
    tokens = tokenise(dataset, text.source, text.revision, job.title_tokens, job.store) if text else None
    store = ItemStore(dataset, tokens=tokens, images="image" in job.encoders)
    with Tables(folder, {m: (items + 1, job.reads[m].count, shapes[m].width) for m in job.encoders}) as tables:
        while tables.rows <= items:
            ids = np.arange(tables.rows, min(tables.rows + ITEMS_PER_CHUNK, items + 1), dtype=np.int64)
            tables.append(_states(store, ids, encoders, job.reads, device))
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
        dtype=DTYPE,
        encoders={m: encoder.facts for m, encoder in encoders.items()},
        sha256={m: _sha256(folder / f"{m}.npy") for m in job.encoders},
        peak_bytes=peaks(device)[1] if device.type == "cuda" else resident,
    )
    write_atomically(folder / "manifest.json", manifest.model_dump_json(indent=1).encode())
    (folder / "progress.json").unlink(missing_ok=True)
    return manifest


@torch.no_grad()
def _states(
    store: ItemStore,
    ids: NDArray[np.int64],
    encoders: Mapping[Modality, Encoder],
    reads: Mapping[Modality, Reads],
    device: torch.device,
) -> dict[Modality, NDArray[np.float16]]:
    """The states of items ``ids`` (n,): (n, levels, width) by modality."""
    items = store.gather(ids).to(device)
    states_of = {}
    for modality, encoder in encoders.items():
        read = encoder.view.encode(reads[modality], tokens=items.tokens, token_mask=items.token_mask, image=items.image)
        assert isinstance(read, Tensor)
        states = read.half()
        if not bool(states.isfinite().all()):
            raise UserError(
                f"encoder '{encoder.facts.source}': a hidden state is not finite in half precision, so it cannot be "
                "cached; remove cached = true"
            )
        states_of[modality] = states.cpu().numpy()
    return states_of


def load(folder: Path, device: torch.device) -> tuple[dict[Modality, Tensor], Placement]:
    """Verify and read a finished cache; returns (N+1, levels, width) float16 by modality, and their placement.

    On the GPU if they fit into half of its free memory; else in host memory if they fit into half of what is
    available, page-locked for a GPU where the system allows it; else memory-mapped.

    Raises UserError if a checksum does not match.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no finished feature cache; run the cell again")
    for modality, digest in manifest.sha256.items():
        path = folder / f"{modality}.npy"
        if not path.is_file() or _sha256(path) != digest:
            raise UserError(f"{path}: its checksum does not match; delete {folder} and run the cell again")
    tables = {m: torch.from_numpy(np.load(folder / f"{m}.npy", mmap_mode="c")) for m in manifest.sha256}
    return _place(tables, _placement(manifest.bytes, device), device)


def _place(
    mapped: dict[Modality, Tensor], placement: Placement, device: torch.device
) -> tuple[dict[Modality, Tensor], Placement]:
    """Move memory-mapped tables to ``placement``; returns them and their actual placement."""
    if placement == "mapped":
        return mapped, placement
    if placement == "device":
        return {modality: table.to(device) for modality, table in mapped.items()}, placement
    if placement == "pinned":
        try:
            return {modality: table.pin_memory() for modality, table in mapped.items()}, placement
        except RuntimeError:  # the system or the container limits locked memory
            placement = "unpinned"
    return {modality: table.clone() for modality, table in mapped.items()}, placement


def _placement(size: int, device: torch.device) -> Placement:
    import psutil

    cuda = device.type == "cuda"
    if cuda and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    if size <= psutil.virtual_memory().available // 2:
        return "pinned" if cuda else "host"
    return "mapped"


def _check_size(size: int, limit: int, folder: Path) -> None:
    written = sum(path.stat().st_size for path in folder.glob("*.npy"))
    free = shutil.disk_usage(folder).free + written
    if size > min(limit, free):
        bound = "the limit (cache_limit_bytes)" if limit < free else f"the free disk space of {folder}"
        raise UserError(f"the feature cache needs {size:,} bytes, more than {bound}, {min(limit, free):,}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Build the cache of the job in the first argument (JSON); prints one progress event per line."""
    job = FeatureJob.model_validate_json(sys.argv[1])
    try:
        build(job, lambda share: print(progress_line("build the feature cache", share), flush=True))  # noqa: T201
    except UserError as error:
        sys.exit(f"tpme: {error}")
    except OSError as error:
        sys.exit(f"tpme: {error.filename or job.store}: {error.strerror or error}")


if __name__ == "__main__":
    main()
