"""Read records into a table: ``load(paths)`` returns a row for every cell, units in the column names.

Only the latest attempt of a cell counts. Ranks and samples stay in their files: the columns ``ranks_path`` and
``samples_path`` name them, ``load_ranks`` and ``load_samples`` read them.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from tpme.bench.errors import UserError
from tpme.bench.quantities import memory_reading
from tpme.bench.record import (
    ENCODER_OPTIONS,
    Cell,
    CellResult,
    EncoderSpec,
    Phase,
    earlier_epochs,
    find_attempts,
    find_results,
    read_result,
)
from tpme.reports.data.ranks import REPORTED, load_arrays, mean_gains
from tpme.reports.data.serving import cell_costs
from tpme.reports.data.trials import select_trials

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recorded:
    """One record and its path."""

    path: Path
    result: CellResult
    device_key: str
    """That of the record, or of its neighbours where the attempt ended before it knew the device."""
    superseded: int = 0
    """Number of older records of the same cell on the same device that this one replaces."""
    latest: bool = True
    """False for an earlier attempt, and for a record that a later run on the same device replaced."""

    def beside(self, name: str) -> str | None:
        """Path of the file ``ranks`` or ``samples`` beside the record; None where there is none."""
        file = self.result.files.get(name)
        return None if file is None else str(self.path.parent / file)


@dataclass(frozen=True)
class Samples:
    """Step times and the memory curve of one cell."""

    step_s: Array
    """Seconds of each training step, shape ``(steps,)``."""
    step_epoch: Array
    """Epoch of each step, from 1, shape ``(steps,)``."""
    sample_t_s: Array
    """Seconds since the start of the cell, shape ``(samples,)``."""
    sample_bytes: Array
    """Memory in use at that time, NaN where it could not be read, shape ``(samples,)``."""


def load(paths: Iterable[Path | str]) -> pd.DataFrame:
    """One row a cell from all records below ``paths`` (folders or record files).

    Rows that are learning-rate trials of one method carry ``selected``, ``search_trials`` and ``search_wall_s``
    (see ``tpme.reports.data.trials``). ``recall_10``, ``ndcg_10`` and the other cut-offs are means over the test users.
    Missing values are NaN or None; the ``*_reason`` column beside them says why.

    Raises:
        UserError: there is no record, or one cannot be read; the message names the file.
    """
    return with_quality(to_frame(read(paths)))


def read(paths: Iterable[Path | str]) -> list[Recorded]:
    """The latest record of each cell below ``paths``, sorted by path. Raises UserError where there is none."""
    roots = [Path(path) for path in paths]
    files = {path.resolve(): path for path in find_results(roots)}
    if not files:
        where = ", ".join(str(root) for root in roots)
        raise UserError(f"{where}: no records (attempt-*.json) in there; name a folder that 'tpme run' wrote")
    with _collector_paused():
        results = {path: read_result(path) for path in sorted(files.values())}
    keys = _device_keys(results)
    latest: dict[tuple[str, str], Recorded] = {}
    for path, result in results.items():
        identity = (result.cell_id, keys[path])
        old = latest.get(identity)
        superseded = 0 if old is None else old.superseded + 1
        newest = Recorded(path, result, keys[path]) if old is None or _age(result) >= _age(old.result) else old
        latest[identity] = replace(newest, superseded=superseded)
    return sorted(latest.values(), key=lambda recorded: recorded.path)


def read_every(paths: Iterable[Path | str]) -> list[Recorded]:
    """The records of ``read``, followed by all others below ``paths``, which are not ``latest``."""
    roots = [Path(path) for path in paths]
    latest = read(roots)
    known = {recorded.path.resolve() for recorded in latest}
    files = {path.resolve(): path for path in find_attempts(roots)}
    results = {path: read_result(path) for resolved, path in files.items() if resolved not in known}
    keys = _device_keys({recorded.path: recorded.result for recorded in latest} | results)
    return [*latest, *(Recorded(path, results[path], keys[path], latest=False) for path in sorted(results))]


def to_frame(records: Sequence[Recorded]) -> pd.DataFrame:
    """The table of ``load`` without the test quality, from records already read; row ``i`` is ``records[i]``."""
    frame = pd.DataFrame([_row(recorded) for recorded in records])
    return select_trials(frame)


def with_quality(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of cells with test Recall and NDCG at the reported cut-offs; NaN for a cell without ranks."""
    names = [f"{metric}_{k}" for metric, k in REPORTED]
    return frame.join(pd.DataFrame(list(map(mean_gains, frame["ranks_path"])), columns=names, index=frame.index))


def load_samples(path: Path | str) -> Samples:
    """Read step times and memory samples beside a record. Raises RecordError like ``load_ranks``."""
    return load_arrays(Path(path), Samples)


def thin(samples: Samples, most: int = 400) -> tuple[Array, Array]:
    """Time and memory of at most ``most`` samples; the largest of neighbours stays, so no peak is lost.

    Samples without a reading are left out.
    """
    read = np.isfinite(samples.sample_bytes)
    time_s, used = samples.sample_t_s[read], samples.sample_bytes[read]
    stride = max(1, math.ceil(len(used) / most))
    starts = np.arange(0, len(used), stride)
    ends = np.minimum(starts + stride, len(used)) - 1
    return time_s[ends], np.maximum.reduceat(used, starts) if len(used) else used


def stretches(result: CellResult, name: Callable[[Phase], str]) -> list[tuple[str, float, float]]:
    """Name, start and end (seconds) of the phases of a cell; neighbours with the same name are merged."""
    ordered = sorted(result.phases, key=lambda phase: phase.start_s)
    runs = [(key, list(phases)) for key, phases in groupby(ordered, key=name)]
    return [(key, phases[0].start_s, phases[-1].start_s + phases[-1].wall_s) for key, phases in runs]


def counter_values(results: Iterable[CellResult], name: str) -> list[float]:
    """The valid values of a counter, one for each record that has one."""
    readings = (result.counters.get(name) for result in results)
    return [reading.value for reading in readings if reading and reading.valid and reading.value is not None]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Suspend garbage collection: all records stay alive, and every pass would scan those read before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.unfreeze()  # moves all to the oldest generation at once; each younger one would scan it
            gc.enable()


# --- one row -------------------------------------------------------------------------------------------------


def _row(recorded: Recorded) -> dict[str, Any]:
    result = recorded.result
    return {
        "path": str(recorded.path),
        "cell_id": result.cell_id,
        "attempt": result.attempt,
        "superseded": recorded.superseded,
        "code_version": result.code_version,
        "status": result.status,
        "failure_phase": result.failure.phase if result.failure else None,
        "failure_message": result.failure.message if result.failure else None,
        "started_at": result.started_at,
        "wall_s": result.wall_s,
        **_cell_columns(result.cell, recorded.device_key),
        **_cost_columns(result),
        **_epoch_columns(result),
        "flags": tuple((flag.code, flag.message) for flag in result.flags),
        "ranks_path": recorded.beside("ranks"),
        "samples_path": recorded.beside("samples"),
    }


def _cell_columns(cell: Cell, device_key: str) -> dict[str, Any]:
    training = cell.training.model_dump(mode="json")
    precision = training.pop("precision")
    return {
        "label": cell.label,
        "method": cell.method,
        "cached": cell.cached,
        "matrix": cell.matrix,
        "baseline": cell.baseline,
        "options": _canonical(cell.options),
        "dataset": cell.dataset,
        "dataset_fingerprint": cell.dataset_fingerprint,
        "modalities": "+".join(cell.modalities),
        "encoders": ", ".join(
            _encoder(spec, modality)
            for modality, spec in (("text", cell.text_encoder), ("image", cell.image_encoder))
            if spec is not None
        ),
        "protocol": cell.protocol,
        "precision": precision,
        "training": _canonical(training),
        "lr": _canonical(cell.lr.model_dump(mode="json")),
        "lr_trial": cell.lr_trial,
        "device": cell.device,
        "device_key": device_key,
        "seed": cell.seed,
    }


def _cost_columns(result: CellResult) -> dict[str, Any]:
    memory = memory_reading("memory_bytes", result.training_memory, result.cell.device)
    any_phase = [memory_reading("memory_seen_bytes", phase.memory, result.cell.device).value for phase in result.phases]
    seen = [value for value in (memory.value, *any_phase) if value is not None]
    parameters, cache = result.parameters, result.cache
    energy = [phase.energy_j.value for phase in result.phases if phase.kind == "train"]
    last = len(result.epochs) - earlier_epochs(result.epochs)
    of_last = _sum(energy[-last:])
    return {
        "epoch_time_s": result.epoch_time_s.value,
        "epoch_time_valid": result.epoch_time_s.valid,
        "epoch_time_reason": result.epoch_time_s.reason,
        "all_in_s": result.all_in_s.value if result.all_in_s else None,
        "memory_bytes": memory.value,
        "memory_source": memory.source,
        "memory_valid": memory.valid,
        "memory_reason": memory.reason,
        "memory_seen_bytes": max(seen, default=None),
        "trainable_millions": parameters.trainable / 1e6 if parameters else None,
        "total_millions": parameters.total / 1e6 if parameters else None,
        "stored_bytes": parameters.stored_bytes if parameters else None,
        "cache_build_s": cache.build_s if cache else None,
        "cache_bytes": cache.bytes if cache else None,
        "training_energy_j": _sum(energy),
        "energy_epoch_j": of_last / last if of_last is not None and last else None,
        **cell_costs(result),
    }


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum of values; ``None`` for none, and where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _epoch_columns(result: CellResult) -> dict[str, Any]:
    best = None
    if result.epochs:
        best = max(result.epochs, key=lambda epoch: (epoch.valid_recall_10, -epoch.index))
        best = next((epoch for epoch in result.epochs if epoch.index == result.best_epoch), best)
    return {
        "epochs_run": len(result.epochs),
        "warmup_epochs": result.warmup_epochs,
        "best_epoch": best.index if best else None,
        "time_to_best_s": sum(epoch.train_s for epoch in result.epochs if epoch.index <= best.index) if best else None,
        "valid_recall_10": best.valid_recall_10 if best else None,
        "valid_ndcg_10": best.valid_ndcg_10 if best else None,
    }


def _encoder(spec: EncoderSpec, modality: str) -> str:
    revision = f"@{spec.revision}" if spec.revision else ""
    defaults = EncoderSpec(source=spec.source)
    options = [
        f"{name} {getattr(spec, name)}" for name in ENCODER_OPTIONS if getattr(spec, name) != getattr(defaults, name)
    ]
    facts = [modality, *(["random weights"] if spec.weights == "random" else []), *options]
    return f"{spec.source}{revision} ({', '.join(facts)})"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


# --- identity ------------------------------------------------------------------------------------------------


def _age(result: CellResult) -> tuple[str, int]:
    return result.started_at, result.attempt


def _device_keys(results: dict[Path, CellResult]) -> dict[Path, str]:
    """Device key of every record; one that ended before it knew its device takes that of its run, if unique."""
    known: dict[tuple[Path | None, str], set[str]] = {}
    for path, result in results.items():
        if result.environment is not None:
            for scope in (path.parent.parent, None):
                known.setdefault((scope, result.cell.device), set()).add(result.environment.device_key)
    keys = {}
    for path, result in results.items():
        if result.environment is not None:
            keys[path] = result.environment.device_key
            continue
        candidates = (known.get((scope, result.cell.device), set()) for scope in (path.parent.parent, None))
        keys[path] = next(
            (next(iter(names)) for names in candidates if len(names) == 1), f"unknown {result.cell.device} device"
        )
    return keys
