"""The columns of one record in the table of ``load``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from tpme.bench.quantities import NAMED, instruments_of, memory_reading
from tpme.bench.record import (
    ENCODER_OPTIONS,
    Cell,
    CellResult,
    EncoderSpec,
    Epoch,
    Evaluation,
    Flag,
    PhaseKind,
    Reading,
    earlier_epochs,
)
from tpme.bench.text import escaped
from tpme.reports.data.serving import cell_costs

ALL_USERS = "all users"
"""The column ``evaluation`` of a cell that is evaluated on no sample."""
BY_OTHERS = "by-others"
"""Code of the flag on a row that was not measured here."""
OWN_PHASES: frozenset[PhaseKind] = frozenset({"count", "inference", "probe"})
"""Kinds of phases in which the suite measures what training does not need."""


def row_of(result: CellResult, device_key: str, users: int | None) -> dict[str, Any]:
    """The columns of ``load`` for one record, without those over several and without paths; each text is one line.

    ``users`` are those of its data, where that is known.
    """
    columns = {
        "cell_id": result.cell_id,
        "attempt": result.attempt,
        "code_version": result.code_version,
        "status": result.status,
        "failure_phase": result.failure.phase if result.failure else None,
        "failure_message": result.failure.message if result.failure else None,
        "started_at": result.started_at,
        "wall_s": result.wall_s if result.source is None or result.wall_s else math.nan,
        **_cell_columns(result.cell, device_key, users),
        "time_of": result.time_of,
        "source": result.source.name if result.source else "",
        **_cost_columns(result),
        **_epoch_columns(result),
        **{f"{NAMED}{name}": _number(metric.value) for name, metric in result.metrics.items()},
        "flags": tuple((flag.code, escaped(flag.message)) for flag in _flags(result)),
    }
    return {name: escaped(value) if isinstance(value, str) else value for name, value in columns.items()}


def _number(reading: Reading) -> float:
    """NaN where it is missing: the column is there although no record of a report may have a value for it."""
    return reading.value if reading.valid and reading.value is not None else math.nan


def _flags(result: CellResult) -> Iterator[Flag]:
    """The flags of a record, with those that follow from it."""
    yield from result.flags
    if result.source is None:
        yield from filter(None, (result.untrained, result.costs_flag, result.held_out_flag))
    else:
        yield Flag(code=BY_OTHERS, message=f"measured by others: {result.source.name}")
    for name, metric in result.metrics.items():
        if not metric.value.valid and result.status == "ok":
            yield Flag(code="no-metric", message=f"no {name}: {metric.value.reason}")


def _cell_columns(cell: Cell, device_key: str, users: int | None) -> dict[str, Any]:
    """Protocol and precision are those of recommendation; another task says in its settings what its rows share."""
    training = cell.training.model_dump(mode="json")
    precision = training.pop("precision")
    other = cell.task != Cell.model_fields["task"].default
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
        "protocol": "" if other else cell.protocol,
        "precision": "" if other else precision,
        "evaluation": "" if other else _evaluation(cell.evaluation, users),
        "task": cell.task,
        "settings": _canonical(cell.settings),
        "training": _canonical(training),
        "lr": _canonical(cell.lr.model_dump(mode="json")),
        "lr_trial": cell.lr_trial,
        "device": cell.device,
        "device_key": device_key,
        "seed": cell.seed,
    }


def _evaluation(evaluation: Evaluation, users: int | None) -> str:
    if evaluation.users is None or (users is not None and evaluation.users >= users):
        return ALL_USERS
    return f"{evaluation.users:,} test users, seed {evaluation.seed}"


def _cost_columns(result: CellResult) -> dict[str, Any]:
    by = instruments_of(result)
    memory, time_s = memory_reading("memory_bytes", result.pass_memory, by), result.pass_time_s
    any_phase = [memory_reading("memory_seen_bytes", phase.memory, by).value for phase in result.phases]
    seen = [value for value in (memory.value, *any_phase) if value is not None]
    parameters, cache = result.parameters, result.cache
    energy = [phase.energy_j.value for phase in result.phases if phase.kind == "train"]
    last = len(result.epochs) - earlier_epochs(result.epochs)
    of_last = _sum(energy[-last:])
    by_rank = [memory_reading("memory_sum_bytes", rank.training_memory, result.cell.device) for rank in result.ranks]
    return {
        "epoch_time_s": time_s.value,
        "epoch_time_valid": time_s.valid,
        "epoch_time_reason": time_s.reason,
        "all_in_s": result.all_in_s.value if result.all_in_s else None,
        "memory_bytes": memory.value,
        "memory_source": memory.source,
        "memory_valid": memory.valid,
        "memory_reason": memory.reason,
        "memory_sum_bytes": _sum([reading.value for reading in by_rank]) if result.status == "ok" else None,
        "memory_seen_bytes": max(seen, default=None),
        **_peak_columns(result),
        "trainable_millions": parameters.trainable / 1e6 if parameters else None,
        "total_millions": parameters.total / 1e6 if parameters and parameters.total is not None else None,
        "stored_bytes": parameters.stored_bytes if parameters else None,
        "cache_build_s": cache.build_s if cache else None,
        "cache_bytes": cache.bytes if cache else None,
        "training_energy_j": _sum(energy),
        "energy_epoch_j": of_last / last if of_last is not None and last else None,
        **cell_costs(result),
    }


def _peak_columns(result: CellResult) -> dict[str, Any]:
    """The whole-run peak by the reading of M, the kind of phase where it lies, and the peak of building a cache.

    M counts with them: a device may lose the reading that M takes in one phase and not in another. Phases in which
    the suite measures for itself (``OWN_PHASES``) do not count. Where an earlier cell built the cache,
    the last is that of the builder's process alone (``load`` takes that cell's, where it is among the records).
    What others published is M alone.
    """
    windows = [("train", result.training_memory), *((phase.kind, phase.memory) for phase in result.phases)]
    readings = (
        (memory_reading("memory_bytes", memory, instruments_of(result)).value, kind)
        for kind, memory in windows
        if kind not in OWN_PHASES
    )
    peaks = [(value, kind) for value, kind in readings if value is not None and result.source is None]
    value, kind = max(peaks, default=(None, None))
    built = max((value for value, kind in peaks if kind == "cache"), default=None)
    by_cell = built is not None
    if built is None and result.cache is not None:
        built = result.cache.peak_bytes.value
    return {"peak_bytes": value, "peak_phase": kind, "cache_peak_bytes": built, "cache_built": by_cell}


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum of values; ``None`` for none, and where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _epoch_columns(result: CellResult) -> dict[str, Any]:
    best = None
    if result.epochs:
        ranked = [epoch for epoch in result.epochs if epoch.valid_recall_10 is not None]
        best = max(ranked, key=lambda epoch: (epoch.valid_recall_10, -epoch.index), default=None)
        best = next((epoch for epoch in result.epochs if epoch.index == result.best_epoch), best)
    return {
        "epochs_run": len(result.epochs),
        "warmup_epochs": result.warmup_epochs,
        "best_epoch": best.index if best else None,
        "time_to_best_s": _time_to_best(result, best) if best else _time_to_best_round(result),
        "valid_recall_10": best.valid_recall_10 if best else _counter(result, "valid_recall_10"),
        "valid_ndcg_10": best.valid_ndcg_10 if best else _counter(result, "valid_ndcg_10"),
    }


def _counter(result: CellResult, name: str) -> float | None:
    """A counter of a method that trains in rounds alone."""
    return result.counters[name].value if result.in_rounds and name in result.counters else None


def _time_to_best(result: CellResult, best: Epoch) -> float:
    """Seconds of everything that leads to the best epoch: all in, less the training epochs after it."""
    if result.all_in_s is not None and result.all_in_s.value is not None:
        return result.all_in_s.value - sum(epoch.train_s for epoch in result.epochs if epoch.index > best.index)
    cache_s = result.cache.build_s if result.cache else 0.0  # of a failed attempt, or an old record
    return cache_s + sum(epoch.train_s for epoch in result.epochs if epoch.index <= best.index)


def _time_to_best_round(result: CellResult) -> float | None:
    """The same of a method that trains in rounds alone."""
    after = _counter(result, "after_best_s")
    all_in = result.all_in_s.value if result.all_in_s else None
    return all_in - after if all_in is not None and after is not None else None


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
