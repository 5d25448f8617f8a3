"""What Ray runs on a node: cells, builders of feature caches, and the check that the node can run either.

A task is a generator: what it yields reaches the launcher while it runs. It yields ``Started`` once, ``Shown`` now and
then and ``Files`` last, which as many further values follow as it says: the bytes of the files in chunks. A task works
in a thread, because only the main thread hears that Ray cancels it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray

from tpme.bench.errors import UserError
from tpme.bench.measure.environment import CELLS_BESIDE, NODE
from tpme.bench.record import CellResult
from tpme.bench.run.attempt import run_job
from tpme.bench.run.engines.inputs_away import moved, moved_source, restored
from tpme.bench.run.engines.local import GPUS
from tpme.bench.run.engines.parcels import (
    MANIFEST,
    Parcel,
    file_sizes,
    number_of_chunks,
    read_chunks,
    unpack,
    unpack_cache,
)
from tpme.bench.run.job import Job
from tpme.bench.run.launch import locked_run, store_folder
from tpme.bench.run.process import POLL_S, Supervision, deferred_signals, raise_signal, run_process
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
class Portion:
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
    share: Portion
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
        _tidy(place)


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
    yield Files(sizes, number_of_chunks(sizes), result.model_dump_json())
    yield from read_chunks(folder, sizes)


def _tidy(place: Path) -> None:
    """Remove what is left of a cell's attempts, save for finished parts of a procedure: another one may use them."""
    for path in place.glob("cells/*/*attempt-*"):
        path.unlink(missing_ok=True)
    if not any(place.glob("cells/*/procedure/*")):
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
    yield Files(sizes, number_of_chunks(sizes))
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
        how = Supervision(left_s, _shower(tell), variables=_variables(order.share), caught=caught)
        run_process(command, log, how)
    log.unlink()


def _moved_feature(feature: dict[str, Any], job: Job, places: Mapping[str, Path], store: Path) -> str:
    """The JSON of a ``FeatureJob`` with this node's folders; without that class, which loads torch."""
    moved_feature = feature | {"dataset": str(places["data"]), "store": str(store)}
    if (modality := feature["modality"]) in places:
        source = moved_source(getattr(job.cell, f"{modality}_encoder"), places[modality])
        moved_feature["encoder"] = feature["encoder"] | {"source": source}
    if feature["initial"] is not None:
        methods = [str(places[f"methods {place}"]) for place in range(len(job.methods_path))]
        moved_feature["initial"] = feature["initial"] | {"methods_path": methods}
    return json.dumps(moved_feature)


# --- the check of a node ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What a node is asked: whether its code of these methods has the same versions, and which caches it has.

    run: mark of the run folder; what a lost worker left of its cells is removed.
    """

    run: str
    versions: Mapping[str, str]
    methods: tuple[Parcel, ...]
    caches: tuple[str, ...]


def check_node(check: Check) -> tuple[str | None, tuple[str, ...]]:
    """Why cells cannot run on this node, or ``None``; and the names of the feature caches that it has."""
    store = _store()
    for place in (store / "ray").glob(f"{check.run}-*"):
        with contextlib.suppress(UserError), locked_run(place):
            _tidy(place)
    methods = [unpack(parcel, store / "shipped", ray.get) for parcel in check.methods]
    there = tuple(name for name in check.caches if (store / "features" / name / MANIFEST).exists())
    for method, version in check.versions.items():
        if not has_version(method, version, tuple(methods)):
            return other_version(method, node_name(_node_id())), there
    return None, there


def other_version(method: str, node: str) -> str:
    """The sentence on a node where ``method`` has another code version."""
    return f"node {node} has another version of tpme, or of method '{method}'; install the launcher's version there"


def check_version(job: Job, methods_path: tuple[Path, ...]) -> None:
    """Raise UserError where a cell's code is another one here: the node came after the check."""
    if not has_version(job.cell.method, job.code_version, methods_path):
        raise UserError(other_version(job.cell.method, node_name(_node_id())))


@cache
def has_version(method: str, version: str, methods_path: tuple[Path, ...]) -> bool:
    """Whether ``version`` is the code version of a method as installed here.

    This process imports no method, which would load torch. One whose class is defined in another module than the one
    that names it is imported by another process.
    """
    origin = available(methods_path).get(method)
    if origin is None:
        return False
    spec = None if origin.endswith(".py") else importlib.util.find_spec(origin.partition(":")[0])
    file = origin if spec is None else spec.origin
    return (file is not None and code_version(Path(file)) == version) or _imported_version(
        method, methods_path
    ) == version


def _imported_version(method: str, methods_path: tuple[Path, ...]) -> str:
    program = (
        "import sys; from pathlib import Path; from tpme.bench.run.version import code_version; "
        "from tpme.methods.registry import source_file; "
        "print(code_version(source_file(sys.argv[1], [*map(Path, sys.argv[2:])])))"
    )
    command = [sys.executable, "-P", "-c", program, method, *map(str, methods_path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# --- on any node -----------------------------------------------------------------------------------------------------


def node_name(node: str) -> str:
    """The name of a node by its id: its own (``ray start --node-name``), else that of its host."""
    for facts in ray.nodes():
        if facts["NodeID"] == node:
            named = str(facts.get("NodeName") or "")
            return named if named not in ("", facts["NodeManagerAddress"]) else str(facts["NodeManagerHostname"])
    return node[:12]


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _store() -> Path:
    return store_folder(None)


def _unpacked(order: Order) -> dict[str, Path]:
    """The folders of what an order needs, by its place in the job."""
    return {place: unpack(parcel, _store() / "shipped", ray.get) for place, parcel in order.parcels.items()}


def _variables(share: Portion) -> dict[str, str]:
    """Variables of a process that owns ``share``: Ray sets a single thread for tasks that name no cores."""
    node = _node_id()
    whole: dict[str, float] = next((facts["Resources"] for facts in ray.nodes() if facts["NodeID"] == node), {})
    beside = int(whole.get("CPU", share.cores)) // share.cores
    told = {"OMP_NUM_THREADS": str(share.cores), NODE: node_name(node)}
    if share.gpus:
        beside = min(beside, int(whole.get("GPU", share.gpus)) // share.gpus)
        told[GPUS] = ",".join(map(str, ray.get_runtime_context().get_accelerator_ids()["GPU"]))
    return told | {CELLS_BESIDE: str(max(1, beside))}


def _shower(tell: Tell) -> Callable[[str, float], None]:
    """A function for ``Supervision`` that passes progress on now and then."""
    last = [0.0]

    def show(what: str, share: float) -> None:
        if time.monotonic() - last[0] >= SHOW_EVERY_S:
            last[0] = time.monotonic()
            tell(Shown(what, share))

    return show


def _streamed(work: Callable[[Tell, list[int]], Any]) -> Generator[Event, None, Any]:
    """Do ``work(tell, caught)`` in a thread, yielding what it tells; returns what it returns."""
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with deferred_signals() as caught, ThreadPoolExecutor(1, thread_name_prefix="tpme-cell") as pool:
        future = pool.submit(work, told.put, caught)
        try:
            yield Started(_node_id())
            while not (future.done() and told.empty()):
                with contextlib.suppress(queue.Empty):
                    yield told.get(timeout=POLL_S)
        except BaseException:
            caught.append(signal.SIGINT)
            raise
    if caught:
        raise_signal(caught[0])
    return future.result()
