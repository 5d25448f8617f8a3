"""The baseline file: the sorted numbers that the gate compares with, one per line, and their devices."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from tpme.bench.errors import UserError, first_problem
from tpme.bench.parsing import read_json
from tpme.bench.record import Environment, Frozen
from tpme.bench.text import escaped_json
from tpme.bench.writing import write_atomically
from tpme.reports.data.load import Recorded
from tpme.reports.data.stats import student_t
from tpme.reports.data.trials import OF_OTHERS
from tpme.reports.gate.measures import (
    GateCell,
    by_cell,
    by_device,
    cell_key,
    finished,
    latest_code,
    measure,
    read_records,
    sort_cells,
    thinned,
)
from tpme.reports.gate.readings import memory, step_times

FORMAT: Literal["tpme-baseline"] = "tpme-baseline"
SCHEMA_VERSION: Literal[1] = 1
NOISE_QUANTILE = 0.95
_ONE_LINE = {"options", "training", "lr", "text_encoder", "image_encoder", "packages"}


class Noise(Frozen):
    """How far runs of the same code differ: the 95 % quantile of the relative differences of all pairs."""

    time: float | None = None
    """For median step times."""
    memory: dict[str, float] = {}
    """For memory peaks, by instrument."""
    pairs: int = 0
    source: str = "not measured: every cell was run once"


class BaselineDevice(Frozen):
    """A device of a baseline and its noise."""

    name: str
    kind: Literal["cpu", "cuda"]
    driver: str | None = None
    cpu_threads: int
    platform: str
    allocator: str
    noise: Noise = Noise()


class Baseline(Frozen):
    """The content of a baseline file."""

    format: Literal["tpme-baseline"] = FORMAT
    schema_version: Literal[1] = SCHEMA_VERSION
    written: str
    """ISO 8601, UTC."""
    tpme: str
    """Version of the package that wrote the file."""
    code_versions: tuple[str, ...] = ()
    """Versions of the measured code."""
    git_revisions: tuple[str, ...] = ()
    """Git revisions of the suite if it ran from a repository; ``+`` marks uncommitted changes."""
    packages: dict[str, str] = {}
    devices: dict[str, BaselineDevice] = {}
    cells: tuple[GateCell, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: cells by key, devices and package versions."""

    source: str
    cells: dict[str, GateCell]
    devices: dict[str, BaselineDevice] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_baseline(path: Path) -> Side:
    """Read a baseline file, or a run folder as a baseline. Raises a one-line UserError for anything else."""
    return load_runs([path]) if path.is_dir() else _from_file(path)


def load_runs(paths: Sequence[Path]) -> Side:
    """Read the records below ``paths``, or one baseline file. Raises a one-line UserError for anything else."""
    if len(paths) == 1 and _is_baseline(paths[0]):
        return _from_file(paths[0])
    source = ", ".join(map(str, paths))
    records, older = latest_code(read_records(paths))
    notes = (f"{older} records of older code in {source} were left out",) if older else ()
    cells = {cell.key: cell for cell in measure(records)}
    devices = _devices(records)
    return Side(source, cells, devices, _packages(records), (*notes, *_by_others(source, devices)))


def _from_file(path: Path) -> Side:
    baseline = read_baseline(path)
    cells = {cell.key: cell for cell in baseline.cells}
    return Side(str(path), cells, baseline.devices, baseline.packages, _by_others(str(path), baseline.devices))


def _by_others(source: str, devices: Iterable[str]) -> tuple[str, ...]:
    """Says of each device whether others measured on it, as records are read here."""
    return tuple(f"{source}: {key}" for key in devices if OF_OTHERS in key)


def from_records(paths: Sequence[Path]) -> Baseline:
    """The baseline of all finished cells below ``paths``; repeats of a cell also give the noise.

    Raises UserError for unreadable records, and if no cell ended reproducibly (``ok``, ``oom`` or ``diverged``).
    """
    records, _ = latest_code(read_records(paths))
    cells = [cell for cell in measure(records) if cell.status in ("ok", "oom", "diverged")]
    if not cells:
        ends = ", ".join(sorted({recorded.result.status for recorded in records}))
        failure = records[0].result.failure
        message = f": {failure.message}" if failure else ""
        raise UserError(f"{paths[0]}: no cell to compare with later; they ended as {ends}{message}")
    return new_baseline(
        [cell.model_copy(update={"devices": {k: thinned(v) for k, v in cell.devices.items()}}) for cell in cells],
        code_versions=tuple(sorted({recorded.result.code_version for recorded in records})),
        git_revisions=tuple(sorted({_revision(env) for env in _environments(records) if env.git_revision})),
        packages=_packages(records),
        devices=_devices(records),
    )


def new_baseline(cells: Iterable[GateCell], **fields: Any) -> Baseline:
    """A baseline of ``cells``, written now by this version."""
    return Baseline(
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        tpme=metadata.version("tpme-bench"),
        cells=tuple(sort_cells(cells)),
        **fields,
    )


def updated(old: Baseline, new: Baseline) -> Baseline:
    """``old`` with the measurements of ``new``, which replace those of the same cells and devices."""
    cells = {cell.key: cell for cell in old.cells}
    for cell in new.cells:
        before = cells.get(cell.key)
        if before is not None:
            merged = {
                "devices": before.devices | cell.devices,
                "quality": cell.quality or before.quality,
                "metrics": cell.metrics or before.metrics,
            }
            cell = cell.model_copy(update=merged)
        cells[cell.key] = cell
    devices = dict(old.devices)
    for key, device in new.devices.items():
        noises = [item.noise for item in (device, old.devices.get(key)) if item is not None]
        devices[key] = device.model_copy(update={"noise": max(noises, key=lambda noise: noise.pairs)})
    return new.model_copy(
        update={
            "cells": tuple(sort_cells(cells.values())),
            "devices": dict(sorted(devices.items())),
            "code_versions": tuple(sorted({*old.code_versions, *new.code_versions})),
            "git_revisions": tuple(sorted({*old.git_revisions, *new.git_revisions})),
        }
    )


# --- the file ------------------------------------------------------------------------------------------------


def write_baseline(baseline: Baseline, path: Path) -> None:
    """Write the file with one number per line for readable diffs; samples and settings take one line each."""
    text = _text(baseline.model_dump(mode="json", exclude_none=True), "")
    write_atomically(path, f"{escaped_json(text)}\n".encode())


def read_baseline(path: Path) -> Baseline:
    """Read what ``write_baseline`` wrote. Raises a one-line UserError for anything else."""
    again = "write it with 'tpme baseline'"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such baseline; {again}") from None
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{path}: not a baseline, it lacks "format": "{FORMAT}"; {again}')
    if raw.get("schema_version") != SCHEMA_VERSION:
        version = raw.get("schema_version")
        raise UserError(f"{path}: baseline of schema version {version!r}, this tpme reads {SCHEMA_VERSION}; {again}")
    try:
        baseline = Baseline.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        first = first_problem(error)
        raise UserError(f"{path}: field '{first.field}': {first.message}; it was changed by hand: {again}") from None
    seen: set[str] = set()
    for cell in baseline.cells:
        if cell.key != cell_key(cell.cell) or cell.key in seen:
            raise UserError(f"{path}: cell {cell.key} ({cell.cell.label}) does not fit its key; {again}")
        seen.add(cell.key)
    return baseline


def _is_baseline(path: Path) -> bool:
    """Whether a file claims to be a baseline, valid or not: ``read_baseline`` reports what is wrong with it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f'"{FORMAT}"'.encode() in file.read(200)


def _text(value: Any, indent: str, name: str = "") -> str:
    inner = indent + " "
    if isinstance(value, dict) and value and name not in _ONE_LINE:
        lines = [f"{inner}{json.dumps(key)}: {_text(item, inner, key)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # counters are whole numbers even if stored as floats
    return json.dumps(value, ensure_ascii=False)


# --- devices and noise ---------------------------------------------------------------------------------------


def _devices(records: Sequence[Recorded]) -> dict[str, BaselineDevice]:
    known = [recorded for recorded in records if recorded.result.environment is not None]
    return {key: _device(runs) for key, runs in by_device(known).items()}


def _device(runs: Sequence[Recorded]) -> BaselineDevice:
    environment = runs[-1].result.environment
    assert environment is not None
    return BaselineDevice(
        name=environment.device_name,
        kind=environment.device_kind,
        driver=environment.driver,
        cpu_threads=environment.cpu_threads,
        platform=environment.platform,
        allocator=environment.allocator,
        noise=widened(noise(runs), runs),
    )


def widened(measured: Noise, runs: Sequence[Recorded]) -> Noise:
    """``measured``, widened for few repeats, whose differences say little about those of further runs.

    The factor is the ratio of the 99.5 % quantiles of Student's t and the normal distribution; the degrees of freedom
    are the repeats without the first of each cell. It is 3.9 for three runs of one cell, 1.2 for three runs of six.
    """
    whole = finished(runs)
    freedom = len(whole) - len(by_cell(whole))
    if not measured.pairs or not freedom:
        return measured
    factor = student_t(freedom) / student_t(math.inf)
    return measured.model_copy(
        update={
            "time": None if measured.time is None else round(factor * measured.time, 4),
            "memory": {name: round(factor * value, 4) for name, value in measured.memory.items()},
            "source": f"{measured.source}, x {factor:.1f} for so few",
        }
    )


def noise(runs: Sequence[Recorded]) -> Noise:
    """How far repeats of a cell differ or, without repeats, the epochs of single runs.

    The latter is at least the noise floor of the device, if a record carries one.
    """
    whole = finished(runs)
    groups = [group for group in by_cell(whole).values() if len(group) > 1]
    if not groups:
        times = [time for recorded in whole for time in _gaps(_epoch_medians(recorded))]
        floor, source = _carried(whole, "noise_time_ratio"), "epochs of single runs; repeat the runs to know more"
        if floor:
            source = f"{source.partition(';')[0]}, and the device's noise floor"
        if not times and not floor:
            return Noise()
        memory_floor = _carried(whole, "noise_memory_ratio")
        return Noise(
            time=max([*floor, *([_high(times)] if times else [])]),
            memory={name: max(memory_floor) for recorded in whole if memory_floor for name in memory(recorded.result)},
            pairs=0,
            source=source,
        )
    steps = [[taken for recorded in group if len(taken := step_times(recorded))] for group in groups]
    times = [gap for group in steps for gap in _gaps([float(np.median(run)) for run in group])]
    peaks: dict[str, list[float]] = {}
    for group in groups:
        read = [memory(recorded.result) for recorded in group]
        for name in sorted(set().union(*read)):
            peaks.setdefault(name, []).extend(_gaps([peak[name] for peak in read if name in peak]))
    pairs = sum(len(group) * (len(group) - 1) // 2 for group in groups)
    return Noise(
        time=_high(times) if times else None,
        memory={name: _high(gaps) for name, gaps in peaks.items() if gaps},
        pairs=pairs,
        source=f"{sum(map(len, groups))} runs of {len(groups)} cell{'s' * (len(groups) != 1)}",
    )


def _carried(runs: Sequence[Recorded], name: str) -> list[float]:
    readings = [recorded.result.counters.get(name) for recorded in runs]
    return [reading.value for reading in readings if reading is not None and reading.value is not None]


def _epoch_medians(recorded: Recorded) -> list[float]:
    result = recorded.result
    return [epoch.train_s / epoch.steps for epoch in result.epochs if epoch.index > result.warmup_epochs]


def _gaps(values: Sequence[float]) -> list[float]:
    """Relative difference of every pair, relative to the smaller value."""
    return [max(a, b) / min(a, b) - 1 for a, b in itertools.combinations(values, 2) if min(a, b) > 0]


def _high(values: Sequence[float]) -> float:
    return round(float(np.quantile(values, NOISE_QUANTILE)), 4)


def _packages(records: Sequence[Recorded]) -> dict[str, str]:
    environments = _environments(records)
    return dict(sorted(environments[-1].packages.items())) if environments else {}


def _environments(records: Sequence[Recorded]) -> list[Environment]:
    return [recorded.result.environment for recorded in records if recorded.result.environment is not None]


def _revision(environment: Environment) -> str:
    return f"{environment.git_revision}{'+' if environment.git_dirty else ''}"
