"""A cell reduced to what the gate compares, from records or a baseline file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import PositiveFloat, field_validator, model_validator

from tpme.bench.errors import UserError
from tpme.bench.quantities import COUNTERS
from tpme.bench.record import (
    NO_IDENTITY,
    Cell,
    CellResult,
    Frozen,
    Status,
    attempt_number,
    find_results,
    read_result,
)
from tpme.bench.side_files import UserRanks, load_ranks
from tpme.reports.data.load import Recorded, of_last_matrix
from tpme.reports.data.stats import Floats, quantiles
from tpme.reports.data.trials import OF_OTHERS
from tpme.reports.data.user_ranks import gains
from tpme.reports.gate.readings import TIMES, memory

SAMPLE = 100
"""Number of step-time quantiles that a baseline keeps of a cell."""
CUTOFF = 10
"""K of the compared quality metrics; a rank beyond it counts as a miss."""
MOST_USERS = 2**25
"""Ranks that a baseline may hold of a cell; a few bytes unpack to any number of them."""


class Timing(Frozen):
    """Times of one cell on one device (seconds): steps and epochs without warm-up epochs, and passes of inference.

    A baseline keeps at most ``SAMPLE`` quantiles of the step times. Quantiles vary less than as many sampled steps, so
    a rank test over them is conservative.
    """

    step_s: tuple[PositiveFloat, ...] = ()
    epoch_s: tuple[PositiveFloat, ...] = ()
    inference_single_s: tuple[PositiveFloat, ...] = ()
    inference_batch_s: tuple[PositiveFloat, ...] = ()
    inference_user_s: tuple[PositiveFloat, ...] = ()


class OnDevice(Frozen):
    """Measurements that are comparable only on the same device."""

    timing: Timing = Timing()
    memory: dict[str, float] = {}
    """Peaks over training by instrument: ``torch_allocated_bytes``, or ``host_rss_bytes`` on a CPU.

    Those of inference begin with ``inference_``.
    """


class Quality(Frozen):
    """Quality of a cell with the rank of every user's target, for the paired test."""

    users: str
    """Digest of users and targets; only cells with equal digests are paired."""
    recall_10: float
    ndcg_10: float
    ranks: str
    """Base64 of deflated bytes, one for each user: the rank, or 0 for a miss."""

    @classmethod
    def of(cls, ranks: UserRanks) -> Quality:
        """Reduce recorded ranks to those up to ``CUTOFF``."""
        rank = np.where((ranks.rank <= CUTOFF) & ~ranks.in_history.astype(bool), ranks.rank, 0).astype(np.uint8)
        return cls(
            users=_digest(ranks),
            recall_10=round(float(gains(ranks, "recall", CUTOFF).mean()), 6),
            ndcg_10=round(float(gains(ranks, "ndcg", CUTOFF).mean()), 6),
            ranks=base64.b64encode(zlib.compress(rank.tobytes(), 9)).decode(),
        )

    @field_validator("ranks")
    @classmethod
    def _whole(cls, text: str) -> str:
        unpacking = zlib.decompressobj()
        try:
            ranks = unpacking.decompress(base64.b64decode(text, validate=True), MOST_USERS)
        except (binascii.Error, zlib.error):
            ranks = b""
        if not (unpacking.eof and ranks) or max(ranks) > CUTOFF:
            raise ValueError("not the ranks that 'tpme baseline' wrote")
        return text

    @model_validator(mode="after")
    def _agrees(self) -> Quality:
        for name, stored in (("recall_10", self.recall_10), ("ndcg_10", self.ndcg_10)):
            if not abs(float(self.gains(name).mean()) - stored) < 1e-5:
                raise ValueError(f"{name} does not match the ranks beside it")
        return self

    def gains(self, name: str) -> Floats:
        """Contribution of each user to ``recall_10`` or ``ndcg_10``, shape ``(users,)``."""
        rank = np.frombuffer(zlib.decompress(base64.b64decode(self.ranks)), dtype=np.uint8)
        hits = np.arange(1, CUTOFF + 1)
        gains = np.ones(CUTOFF) if name == "recall_10" else 1 / np.log2(1 + hits)
        return np.concatenate([[0.0], gains])[rank]


def _digest(ranks: UserRanks) -> str:
    digest = hashlib.sha256()
    for values in (ranks.target, ranks.user):
        if values is not None:
            digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()[:12]


class GateMetric(Frozen):
    """A metric that records name themselves, in every finished run of a cell."""

    values: tuple[float, ...]
    higher_is_better: bool


class GateCell(Frozen):
    """One cell, pooled over its runs."""

    key: str
    """Identity of the cell, independent of the code version: see ``cell_key``."""
    cell: Cell
    status: Status = "ok"
    counters: dict[str, float] = {}
    own_counters: dict[str, float] = {}
    """From the method's ``report()``: printed but not judged, because their direction is unknown."""
    devices: dict[str, OnDevice] = {}
    quality: Quality | None = None
    no_quality: str | None = None
    """Why ``quality`` is missing."""
    metrics: dict[str, GateMetric] | None = None
    """Named metrics in its place, of other tasks than recommendation."""


def cell_key(cell: Cell) -> str:
    """Identity of a cell for comparisons: 12 hex digits over its settings.

    Unlike the cell's id it leaves out the code version, which is what is compared, the device, which matters only for
    time and memory, the position among learning-rate trials, and settings at their defaults: a baseline stays valid
    when a later version adds settings.
    """
    settings = cell.model_dump(mode="json", exclude={"device", *NO_IDENTITY}, exclude_defaults=True)
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def read_records(paths: Iterable[Path]) -> list[Recorded]:
    """The records below ``paths``: the latest attempt of each cell folder; a cell in two runs counts twice.

    Of a run folder the cells of its last matrix count, as in a report.

    Raises UserError if there are none or one cannot be read.
    """
    roots = list(paths)
    found = of_last_matrix(find_results(roots), roots)
    records = {path.resolve(): path for path in found if attempt_number(path) or path in roots}
    if not records:
        where = ", ".join(map(str, roots))
        raise UserError(f"{where}: an empty run without records (attempt-*.json); run its matrix first")
    return [_recorded(path) for path in records.values()]


def _recorded(path: Path) -> Recorded:
    result = read_result(path)
    key = result.environment.device_key if result.environment else f"unknown {result.cell.device} device"
    if result.source is not None:  # so no time of theirs meets one of ours
        key = f"{key}, {OF_OTHERS}{result.source.name}"
    return Recorded(path, result, key)


def latest_code(records: Sequence[Recorded]) -> tuple[list[Recorded], int]:
    """The records of the latest code version of each cell on each device, and the number of older ones."""
    newest: dict[tuple[str, str], CellResult] = {}
    for recorded in records:
        place = cell_key(recorded.result.cell), recorded.device_key
        if place not in newest or recorded.result.started_at >= newest[place].started_at:
            newest[place] = recorded.result
    kept = [
        recorded
        for recorded in records
        if recorded.result.code_version == newest[cell_key(recorded.result.cell), recorded.device_key].code_version
    ]
    return kept, len(records) - len(kept)


def measure(records: Sequence[Recorded]) -> list[GateCell]:
    """One ``GateCell`` for each cell, in the order of ``sort_cells``; repeats on one device are pooled.

    Raises UserError if repeats disagree about an exact counter: something changed between the runs.
    """
    return sort_cells(_gate_cell(key, runs) for key, runs in by_cell(records).items())


def by_cell(records: Iterable[Recorded]) -> dict[str, list[Recorded]]:
    """The records of each cell, by its key."""
    groups: dict[str, list[Recorded]] = {}
    for recorded in records:
        groups.setdefault(cell_key(recorded.result.cell), []).append(recorded)
    return groups


def by_device(records: Iterable[Recorded]) -> dict[str, list[Recorded]]:
    """The records of each device, sorted by its key."""
    groups: dict[str, list[Recorded]] = {}
    for recorded in records:
        groups.setdefault(recorded.device_key, []).append(recorded)
    return dict(sorted(groups.items()))


def finished(records: Iterable[Recorded]) -> list[Recorded]:
    """The records of cells that ended ``ok``."""
    return [recorded for recorded in records if recorded.result.status == "ok"]


def sort_cells(cells: Iterable[GateCell]) -> list[GateCell]:
    """Cells by data set, row, options, seed and key: the order of baseline files and of the gate's tables."""

    def order(item: GateCell) -> tuple[str, str, str, int, str]:
        options = json.dumps(item.cell.options, sort_keys=True)
        return item.cell.dataset, item.cell.label, options, item.cell.seed, item.key

    return sorted(cells, key=order)


def _gate_cell(key: str, runs: Sequence[Recorded]) -> GateCell:
    whole = finished(runs)
    last = max(whole or runs, key=lambda recorded: recorded.result.started_at)
    quality, reason = _quality(last)
    return GateCell(
        key=key,
        cell=last.result.cell,
        status=last.result.status,
        counters=_agreed([(recorded, counters(recorded.result)) for recorded in whole or [last]]),
        own_counters=_own_counters(last.result),
        devices={name: _on_device(group) for name, group in by_device(whole).items()},
        quality=quality,
        no_quality=None if last.result.metrics else reason,
        metrics=_metrics(whole),
    )


def _metrics(runs: Sequence[Recorded]) -> dict[str, GateMetric] | None:
    found: dict[str, GateMetric] = {}
    for recorded in runs:
        for name, metric in recorded.result.metrics.items():
            if metric.value.valid and metric.value.value is not None:
                before = found[name].values if name in found else ()
                value = round(metric.value.value, 6)
                found[name] = GateMetric(values=(*before, value), higher_is_better=metric.higher_is_better)
    return found or None


def counters(result: CellResult) -> dict[str, float]:
    """The exact counters of a record that are known and valid."""
    counted: dict[str, float] = {}
    if result.parameters is not None:
        counted["trainable_parameters"] = result.parameters.trainable
        counted["trainable_parameters_max"] = result.parameters.trainable_max
        if result.parameters.total is not None:
            counted["total_parameters"] = result.parameters.total
        if result.parameters.stored_bytes is not None:
            counted["stored_bytes"] = result.parameters.stored_bytes
    if result.epochs:
        counted["steps_per_epoch"] = result.epochs[-1].steps
        if len(result.epochs) >= result.cell.training.epochs:  # early stopping is not exact
            counted["steps"] = sum(epoch.steps for epoch in result.epochs)
    readings = dict(result.counters)
    if result.inference is not None:
        readings["inference_loaded_bytes"] = result.inference.loaded_bytes
        if not result.inference.flops_by_data:
            readings["inference_flops"] = result.inference.flops_per_item
    for name in COUNTERS:
        reading = readings.get(name)
        if reading is not None and reading.valid and reading.value is not None:
            counted.setdefault(name, reading.value)
    return counted


def _own_counters(result: CellResult) -> dict[str, float]:
    """Counters that are not exact: a method's own, and the FLOPs of inference where they depend on the data."""
    readings = {
        name: reading
        for name, reading in sorted(result.counters.items())
        if name not in COUNTERS and reading.source.startswith("report()")
    }
    if result.inference is not None and result.inference.flops_by_data:
        readings["inference_flops"] = result.inference.flops_per_item
    return {name: reading.value for name, reading in readings.items() if reading.value is not None}


def _agreed(counted: Sequence[tuple[Recorded, dict[str, float]]]) -> dict[str, float]:
    first, expected = counted[0]
    for other, values in counted[1:]:
        for name in expected.keys() & values.keys():
            if expected[name] != values[name]:
                raise UserError(
                    f"{other.path}: {name} is {values[name]:g}, in {first.path} it is {expected[name]:g} for the same "
                    "cell; the runs are not repeats of the same code, check them separately"
                )
    return {name: expected[name] for name in COUNTERS if name in expected}


def _on_device(runs: Sequence[Recorded]) -> OnDevice:
    times = {name: np.concatenate([read(recorded) for recorded in runs]) for name, read in TIMES.items()}
    peaks: dict[str, list[float]] = {}
    for recorded in runs:
        for name, value in memory(recorded.result).items():
            peaks.setdefault(name, []).append(value)
    return OnDevice(
        timing=Timing(**{name: tuple(map(float, values)) for name, values in times.items()}),
        memory={name: float(np.median(values)) for name, values in peaks.items()},
    )


def _quality(recorded: Recorded) -> tuple[Quality | None, str | None]:
    result = recorded.result
    if any(flag.code == "random-weights" for flag in result.flags):
        return None, "an encoder with random weights: its quality is meaningless"
    path = recorded.beside("ranks")
    return (None, "no ranks were recorded") if path is None else (Quality.of(load_ranks(path)), None)


def thinned(on_device: OnDevice) -> OnDevice:
    """The measurements as a baseline keeps them: at most ``SAMPLE`` times, with four digits."""
    kept = {name: quantiles(np.array(values, dtype=np.float64), SAMPLE) for name, values in on_device.timing}
    rounded = {name: tuple(float(f"{value:.4g}") for value in values) for name, values in kept.items()}
    return OnDevice(timing=Timing(**rounded), memory=on_device.memory)
