"""What Ray runs on a node: cells, builders of feature caches, and the check that the node can run either.

A task is a generator: what it yields reaches the launcher while it runs. It yields ``Started`` once, ``Shown`` now and
then and ``Files`` last, which as many further values follow as it says: the bytes of the files in chunks. A task works
in a thread, because only the main thread hears that Ray cancels it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray

from tpme.bench.errors import UserError, one_line
from tpme.bench.measure.environment import CELLS_BESIDE, NODE
from tpme.bench.record import CellResult
from tpme.bench.run.attempt import run_job
from tpme.bench.run.engines.inputs_away import ENCODERS, moved, moved_source, restored
from tpme.bench.run.engines.local import GPUS
from tpme.bench.run.engines.parcels import MANIFEST, Parcel, file_sizes, read_chunks, unpack, unpack_cache
from tpme.bench.run.job import Job
from tpme.bench.run.launch import locked_run, store_folder
from tpme.bench.run.process import POLL_S, deferred_signals, raise_signal, run_process
from tpme.bench.run.version import code_version
from tpme.methods.registry import available

SHOW_EVERY_S = 2.0


@dataclass(frozen=True)
class Started:
    """The task runs on a node, by its id."""

    node: str


@dataclass(frozen=True)
class Shown:
    """How far the task is."""

    what: str
    share: float


@dataclass(frozen=True)
class Files:
    """What the task leaves: files by name, which come in so many chunks, and the record of a cell."""

    sizes: Mapping[str, int]
    chunks: int
    record: str | None = None


@dataclass(frozen=True)
class Share:
    """What a task owns of its node."""

    cores: int
    gpus: int


@dataclass(frozen=True)
class Order:
    """A cell, or a feature cache, to be made on a node.

    job: as on the launcher's machine. parcels: what it reads, by its place in the job. run: mark of the run folder.
    share: what it owns. caches: feature caches that others have built.
    """

    job: Job
    parcels: Mapping[str, Parcel]
    run: str
    share: Share
    caches: tuple[Parcel, ...] = ()


@dataclass(frozen=True)
class CacheOrder(Order):
    """The feature cache ``key``. features: its jobs, as ``FeatureJob`` in JSON. ship: whether others want it."""

    key: str = ""
    features: tuple[dict[str, Any], ...] = ()
    ship: bool = True


Event = Started | Shown | Files | bytes
Tell = Callable[[Event], None]


def run_cell(order: Order) -> Iterator[Event]:
    """Run the attempt of an order, and hand over its files and its record."""
    place = _store() / "ray" / f"{order.run}-{order.job.folder.name}"
    try:
        result = yield from _streamed(lambda tell, caught: _cell(order, place, tell, caught))
        yield from _handed_over(place / "cells" / order.job.folder.name, order.job, result)
    finally:
        _tidy(place, order.job)


def _cell(order: Order, place: Path, tell: Tell, caught: list[int]) -> CellResult:
    node, store = node_name(_node_id()), _store()
    job = moved(order.job, _unpacked(order), store, place / "cells" / order.job.folder.name)
    check_version(order.job, job.methods_path)
    for parcel in order.caches:
        with contextlib.suppress(ray.exceptions.RayError):  # its node is lost; the cell builds its own
            unpack_cache(parcel, store / "features" / parcel.name, ray.get)
    with locked_run(place) as lock:  # ends what an earlier attempt of a lost worker may have left
        result = run_job(job, show=_shower(tell), lock=lock, variables=_variables(order.share), caught=caught)
    return restored(result, order.job, node)


def _handed_over(folder: Path, job: Job, result: CellResult) -> Iterator[Event]:
    names = sorted(path.name for path in folder.glob(f"attempt-{job.attempt}.*") if path.suffix != ".json")
    sizes = file_sizes(folder, names)
    chunks = list(_lengths(sizes))
    yield Files(sizes, len(chunks), result.model_dump_json())
    yield from read_chunks(folder, sizes)


def _tidy(place: Path, job: Job) -> None:
    """Remove what is left on the node, save for finished parts of a procedure: another attempt may use them."""
    folder = place / "cells" / job.folder.name
    for path in folder.glob("*attempt-*"):
        path.unlink(missing_ok=True)
    if not any(folder.glob("procedure/*")):
        shutil.rmtree(place, ignore_errors=True)


def build_cache(order: CacheOrder) -> Iterator[Event]:
    """Build a feature cache on this node, unless it is there, and hand it over where others want it.

    A builder that fails leaves none: the cells that train on it fail likewise, each with its own record.
    """
    folder = _store() / "features" / order.key
    yield from _streamed(lambda tell, caught: _build(order, tell, caught))
    sizes: dict[str, int] = {}
    if order.ship and (folder / MANIFEST).exists():
        names = sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".safetensors"))
        sizes = file_sizes(folder, [*names, MANIFEST])
    yield Files(sizes, len(list(_lengths(sizes))))
    yield from read_chunks(folder, sizes)


def _build(order: CacheOrder, tell: Tell, caught: list[int]) -> None:
    store, places = _store(), _unpacked(order)
    log = store / "ray" / f"{order.run}-{order.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + order.job.time_limit_s
    for feature in order.features:
        command = [sys.executable, "-P", "-m", "tpme.bench.train.feature_builder"]
        command += [_moved_feature(feature, order.job, places, store), str(os.getpid())]
        left_s = max(0.0, until - time.monotonic())
        variables = _variables(order.share)
        run_process(command, log=log, limit_s=left_s, show=_shower(tell), variables=variables, caught=caught)
    log.unlink()


def _moved_feature(feature: dict[str, Any], job: Job, places: Mapping[str, Path], store: Path) -> str:
    """The JSON of a ``FeatureJob`` with this node's folders; without that class, which loads torch."""
    import json

    moved_feature = feature | {"dataset": str(places["data"]), "store": str(store)}
    modality = next(modality for modality in ENCODERS if modality == feature["modality"])
    if modality in places:
        source = moved_source(getattr(job.cell, f"{modality}_encoder"), places[modality])
        moved_feature["encoder"] = feature["encoder"] | {"source": source}
    if feature["initial"] is not None:
        methods = [str(places[f"methods {place}"]) for place in range(len(job.methods_path))]
        moved_feature["initial"] = feature["initial"] | {"methods_path": methods}
    return json.dumps(moved_feature)
