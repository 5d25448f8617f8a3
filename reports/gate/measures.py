"""What one cell measured, reduced to what the gate compares: from records, and as it stands in a baseline file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveFloat, field_validator, model_validator

from tpme.bench.errors import UserError
from tpme.bench.quantities import memory_instrument
from tpme.bench.record import (
    Cell,
    CellResult,
    Frozen,
    Reading,
    RecordError,
    Status,
    attempt_number,
    find_results,
    read_result,
)
from tpme.reports.data.load import Recorded, load_samples
from tpme.reports.data.ranks import Ranks, gains, load_ranks
from tpme.reports.data.stats import Floats, quantiles
from tpme.reports.gate.metrics import COUNTERS

SAMPLE = 100
"""Step times that a baseline keeps of a cell, as quantiles."""
CUTOFF = 10
"""K of the quality that is compared; ranks beyond it are not kept."""


class Timing(Frozen):
    """Step and epoch times of one cell on one device, warm-up epochs left out (seconds).

    A baseline keeps at most ``SAMPLE`` quantiles of the step times. They vary less than as many drawn steps would, so
    a test that takes them for drawn ones errs on the quiet side.
    """

    step_s: tuple[PositiveFloat, ...] = ()
    epoch_s: tuple[PositiveFloat, ...] = ()


class OnDevice(Frozen):
    """What may be compared only on the same device."""

    timing: Timing = Timing()
    memory: dict[str, float] = {}
    """Peaks over training by instrument: ``torch_allocated_bytes``, on a CPU ``host_rss_bytes``."""


class Quality(Frozen):
    """What the test needs of every user: the rank of the target, cut off behind ``CUTOFF``."""

    users: str
    """Digest of users and targets: only equal ones are paired."""
    recall_10: float
    ndcg_10: float
    ranks: str
    """Base64 of deflated bytes, one a user: the rank, or 0 for a miss."""

    @classmethod
    def of(cls, ranks: Ranks) -> Quality:
        """Reduce the recorded ranks."""
        rank = np.where((ranks.rank <= CUTOFF) & ~ranks.in_history.astype(bool), ranks.rank, 0).astype(np.uint8)
        return cls(
            users=hashlib.sha256(np.ascontiguousarray(ranks.target, dtype="<i8").tobytes()).hexdigest()[:12],
            recall_10=round(float(gains(ranks, "recall", CUTOFF).mean()), 6),
            ndcg_10=round(float(gains(ranks, "ndcg", CUTOFF).mean()), 6),
            ranks=base64.b64encode(zlib.compress(rank.tobytes(), 9)).decode(),
        )

    @field_validator("ranks")
    @classmethod
    def _whole(cls, text: str) -> str:
        try:
            zlib.decompress(base64.b64decode(text, validate=True))
        except (binascii.Error, zlib.error):
            raise ValueError("not the ranks that 'tpme baseline' wrote") from None
        return text

    @model_validator(mode="after")
    def _agrees(self) -> Quality:
        for name, told in (("recall_10", self.recall_10), ("ndcg_10", self.ndcg_10)):
            if not abs(float(self.gains(name).mean()) - told) < 1e-5:
                raise ValueError(f"{name} is not what the ranks beside it say")
        return self

    def gains(self, name: str) -> Floats:
        """What each user adds to ``recall_10`` or ``ndcg_10``, shape ``(users,)``."""
        rank = np.frombuffer(zlib.decompress(base64.b64decode(self.ranks)), dtype=np.uint8).astype(np.float64)
        if name == "recall_10":
            return (rank > 0).astype(np.float64)
        return np.where(rank > 0, 1 / np.log2(1 + np.maximum(rank, 1)), 0.0)


class Measured(Frozen):
    """One cell, whatever number of runs it was measured in."""

    key: str
    """Identity of what was run, whatever the code: see ``cell_key``."""
    cell: Cell
    status: Status = "ok"
    counters: dict[str, float] = {}
    own_counters: dict[str, float] = {}
    """Of the method's ``report()``: told, not judged, for nobody knows which way is better."""
    devices: dict[str, OnDevice] = {}
    quality: Quality | None = None
    no_quality: str | None = None
    """Why ``quality`` is missing."""


def cell_key(cell: Cell) -> str:
    """Identity of a cell for comparisons: 12 hex digits over all that was run.

    Unlike the cell's id it leaves out the code's version, which is what is compared, the device, which bounds only
    time and memory, and the place among learning-rate trials; and settings at their defaults, so that a baseline
    stays one when a later version knows further settings.
    """
    what = cell.model_dump(mode="json", exclude={"device", "lr_trial", "lr_trials"}, exclude_defaults=True)
    canonical = json.dumps(what, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def read_records(paths: Iterable[Path]) -> list[Recorded]:
    """All records below ``paths``, of each cell folder the latest attempt; the same cell in two runs counts twice.

    Raises UserError where there is none, or one cannot be read.
    """
    roots = list(paths)
    found = {path.resolve(): path for path in find_results(roots) if attempt_number(path) or path in roots}
    if not found:
        where = ", ".join(map(str, roots))
        raise UserError(f"{where}: an empty run, no records (attempt-*.json) in there; run its matrix first")
    return [_recorded(path) for path in found.values()]


def _recorded(path: Path) -> Recorded:
    result = read_result(path)
    key = result.environment.device_key if result.environment else f"unknown {result.cell.device} device"
    return Recorded(path, result, key)


def latest_code(records: Sequence[Recorded]) -> tuple[list[Recorded], int]:
    """Of each cell on each device the records of the code that ran last, and how many older ones were left out."""
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


def measure(records: Sequence[Recorded]) -> list[Measured]:
    """One ``Measured`` a cell, sorted for people; repeats of a cell on one device are pooled.

    Raises UserError where repeats disagree about an exact counter: then something else was changed between them.
    """
    by_key: dict[str, list[Recorded]] = {}
    for recorded in records:
        by_key.setdefault(cell_key(recorded.result.cell), []).append(recorded)
    return sort_cells(_measured(key, runs) for key, runs in by_key.items())


def sort_cells(cells: Iterable[Measured]) -> list[Measured]:
    """By data set, row, options, seed and key: the order of a baseline file and of every table of the gate."""

    def order(one: Measured) -> tuple[str, str, str, int, str]:
        options = json.dumps(one.cell.options, sort_keys=True)
        return one.cell.dataset, one.cell.label, options, one.cell.seed, one.key

    return sorted(cells, key=order)


def _measured(key: str, runs: Sequence[Recorded]) -> Measured:
    whole = [recorded for recorded in runs if recorded.result.status == "ok"]
    last = max(whole or runs, key=lambda recorded: recorded.result.started_at)
    by_device: dict[str, list[Recorded]] = {}
    for recorded in whole:
        by_device.setdefault(recorded.device_key, []).append(recorded)
    quality, reason = _quality(last)
    return Measured(
        key=key,
        cell=last.result.cell,
        status=last.result.status,
        counters=_agreed([(recorded, counters(recorded.result)) for recorded in whole or [last]]),
        own_counters=_own_counters(last.result),
        devices={name: _on_device(group) for name, group in sorted(by_device.items())},
        quality=quality,
        no_quality=reason,
    )


def counters(result: CellResult) -> dict[str, float]:
    """The exact counters of a record, those that are known and valid."""
    found: dict[str, float] = {}
    if result.parameters is not None:
        found["trainable_parameters"] = result.parameters.trainable
        found["trainable_parameters_max"] = result.parameters.trainable_max
        found["total_parameters"] = result.parameters.total
        found["stored_bytes"] = result.parameters.stored_bytes
    if result.epochs:
        found["steps_per_epoch"] = result.epochs[0].steps
        if len(result.epochs) >= result.cell.training.epochs:  # else validation stopped it, which is not exact
            found["steps"] = sum(epoch.steps for epoch in result.epochs)
    for name in COUNTERS:
        reading = result.counters.get(name)
        if reading is not None and reading.valid and reading.value is not None:
            found.setdefault(name, reading.value)
    return found


def _own_counters(result: CellResult) -> dict[str, float]:
    return {
        name: reading.value
        for name, reading in sorted(result.counters.items())
        if name not in COUNTERS and reading.source.startswith("report()") and reading.value is not None
    }


def _agreed(found: Sequence[tuple[Recorded, dict[str, float]]]) -> dict[str, float]:
    first, told = found[0]
    for other, counted in found[1:]:
        for name in told.keys() & counted.keys():
            if told[name] != counted[name]:
                raise UserError(
                    f"{other.path}: {name} is {counted[name]:g}, in {first.path} it is {told[name]:g} for the same "
                    "cell; the runs are not repeats of one code, check them apart"
                )
    return {name: told[name] for name in COUNTERS if name in told}


def _on_device(runs: Sequence[Recorded]) -> OnDevice:
    steps, epochs, peaks = [], [], dict[str, list[float]]()
    for recorded in runs:
        result = recorded.result
        steps.append(step_times(recorded))
        epochs.append(epoch_times(recorded))
        for name, value in memory(result).items():
            peaks.setdefault(name, []).append(value)
    return OnDevice(
        timing=Timing(
            step_s=tuple(map(float, np.concatenate(steps))), epoch_s=tuple(map(float, np.concatenate(epochs)))
        ),
        memory={name: float(np.median(values)) for name, values in peaks.items()},
    )


def step_times(recorded: Recorded) -> Floats:
    """Seconds of every training step after the warm-up, shape ``(steps,)``.

    Where the run was too short for warm-up epochs it is the first step alone, in which everything happens first.
    """
    name, warmup = recorded.result.files.get("samples"), recorded.result.warmup_epochs
    if name is None:
        return np.empty(0)
    path = recorded.path.parent / name
    samples = load_samples(path)
    counted: Floats = np.asarray(samples.step_s, dtype=np.float64)
    if len(counted) != len(samples.step_epoch) or not (np.isfinite(counted) & (counted > 0)).all():
        raise RecordError(f"{path}: its step times are not positive, or not one an epoch number; run the cell again")
    return counted[samples.step_epoch > warmup] if warmup else counted[1:]


def epoch_times(recorded: Recorded) -> Floats:
    """Training seconds of every epoch after the warm-up epochs, shape ``(epochs,)``."""
    result = recorded.result
    return np.array([epoch.train_s for epoch in result.epochs if epoch.index > result.warmup_epochs], dtype=np.float64)


def memory(result: CellResult) -> dict[str, float]:
    """The peaks over training that are gated: allocated by torch, and on a CPU, where there is none, resident."""
    if result.training_memory is None:
        return {}
    name = memory_instrument("measured_peak_bytes", result.training_memory, result.cell.device)
    reading: Reading = getattr(result.training_memory, name)
    return {name: reading.value} if reading.valid and reading.value is not None else {}


def _quality(recorded: Recorded) -> tuple[Quality | None, str | None]:
    result = recorded.result
    if any(flag.code == "random-weights" for flag in result.flags):
        return None, "an encoder with random weights: its quality means nothing"
    name = result.files.get("ranks")
    if name is None:
        return None, "no ranks were recorded"
    return Quality.of(load_ranks(recorded.path.parent / name)), None


def thinned(on_device: OnDevice) -> OnDevice:
    """The same with bounded samples of four digits: what a baseline keeps."""
    timing = Timing(step_s=_digits(on_device.timing.step_s), epoch_s=_digits(on_device.timing.epoch_s))
    return OnDevice(timing=timing, memory=on_device.memory)


def _digits(values: Sequence[float]) -> tuple[float, ...]:
    kept: Any = quantiles(np.array(values, dtype=np.float64), SAMPLE)
    return tuple(float(f"{value:.4g}") for value in kept)
