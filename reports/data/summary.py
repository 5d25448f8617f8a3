"""One line of the summary of a section: a row over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tpme.bench.quantities import instruments_of, memory_reading
from tpme.bench.record import CellResult
from tpme.bench.side_files import UserRanks, load_ranks
from tpme.reports.data.metrics import spread
from tpme.reports.data.resampling import Repeats
from tpme.reports.data.stats import Floats
from tpme.reports.data.trials import Line, lines_of

SHARED = ("label", "method", "baseline", "cached", "options", "lr", "search_trials", "search_cells", "search_wall_s")
VARIED = (
    *("epoch_time_s", "all_in_s", "memory_bytes", "time_to_best_s", "wall_s", "training_energy_j"),
    "inference_items_per_s",
)
"""Values reported with their standard deviation over seeds."""
MEANS = (
    *VARIED,
    "memory_sum_bytes",
    "cache_build_s",
    "best_epoch",
    "epochs_run",
    "valid_recall_10",
)  # seeds share one cache build


LARGEST = (
    *("trainable_millions", "total_millions", "stored_bytes", "memory_seen_bytes"),
    *("cache_bytes", "cache_peak_bytes"),
)
"""Values whose largest counts."""
TRUST = {"peak_bytes": "memory", "memory_bytes": "memory", "epoch_time_s": "epoch_time"}
"""Columns whose readings may be doubtful: ``<name>_valid`` and ``<name>_reason`` belong to them."""


def seeds_of(cells: pd.DataFrame) -> dict[str, list[Line]]:
    """The cells of the selected trial of each row, rows by name."""
    rows: dict[str, list[Line]] = {}
    for cell in lines_of(cells[cells["selected"]]):
        rows.setdefault(cell["row"], []).append(cell)
    return dict(sorted(rows.items()))


def used(seeds: Sequence[Line]) -> Sequence[Line]:
    """The seeds that finished, or all where none did."""
    return [cell for cell in seeds if cell["status"] == "ok"] or seeds


def line_of(seeds: Sequence[Line]) -> dict[str, Any]:
    """The line of a row: means over its finished seeds, or what the failed attempts left where none finished.

    ``epoch_time_s_sd`` and the like are standard deviations over seeds, NaN for one seed.
    """
    cells = used(seeds)
    finished = cells if cells[0]["status"] == "ok" else []
    line: dict[str, Any] = {name: seeds[0][name] for name in SHARED}
    line["status"] = cells[0]["status"]
    line["seeds"] = len({cell["seed"] for cell in seeds})
    line["seeds_ok"] = len({cell["seed"] for cell in finished})
    for name in MEANS:
        line[name] = _mean(_values(cells, name))
    for name in VARIED:
        line[f"{name}_sd"] = _spread(_values(cells, name))
    energy = _values(finished, "energy_epoch_j")
    line["energy_epoch_j"], line["energy_epoch_j_sd"] = _mean(energy), _spread(energy)
    for name in LARGEST:
        line[name] = float(np.fmax.reduce(_values(cells, name)))
    highest = max(cells, key=lambda cell: np.nan_to_num(cell["peak_bytes"], nan=-1.0))
    line["peak_bytes"], line["peak_phase"] = highest["peak_bytes"], highest["peak_phase"]
    line["cache_built"] = any(cell["cache_built"] for cell in cells)
    for name in ("epoch_time", "memory"):
        line[f"{name}_valid"] = all(cell[f"{name}_valid"] for cell in cells)
        reasons = (cell[f"{name}_reason"] for cell in cells)
        line[f"{name}_reason"] = next((reason for reason in reasons if isinstance(reason, str)), None)
    line["memory_source"] = ", ".join(sorted({cell["memory_source"] for cell in cells}))
    return line


def doubt(line: Line, key: str) -> str | None:
    """Why a column of a row's line is missing or not to be trusted; None where no reading says so.

    What makes M doubtful, such as other processes on the device, makes the whole-run peak doubtful, too. Where there is
    no M, nothing was trained, which says nothing against the peak.
    """
    name = TRUST.get(key)
    if name is None or line[f"{name}_valid"] or (key == "peak_bytes" and np.isnan(line["memory_bytes"])):
        return None
    return str(line[f"{name}_reason"])


def _values(cells: Sequence[Line], name: str) -> Floats:
    """One number of every cell, NaN where it is missing."""
    return np.array([cell[name] for cell in cells], dtype=np.float64)


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _spread(values: Floats) -> float:
    return spread(values[~np.isnan(values)])


def repeats_of(seeds: Sequence[CellResult]) -> Repeats:
    """Repeated measurements of a row that trained; M is NaN where it is unknown."""
    times: list[list[float | None]] = [
        [epoch.train_s for epoch in result.epochs[result.warmup_epochs :]] or [result.pass_time_s.value]
        for result in seeds
    ]
    memory = [memory_reading("memory_bytes", result.pass_memory, instruments_of(result)).value for result in seeds]
    return Repeats(
        epochs_s=tuple(np.array(seconds, dtype=np.float64) for seconds in times),
        memory_bytes=np.array(memory, dtype=np.float64),
        trainable_millions=max((seed.parameters.trainable for seed in seeds if seed.parameters), default=np.nan) / 1e6,
        summed=all(map(_is_sum, seeds)),
    )


def _is_sum(result: CellResult) -> bool:
    """Whether T is the time of all parts of a run together; as a median of several it is less."""
    parts, total = [epoch.train_s for epoch in result.epochs], result.pass_time_s.value
    return total is not None and len(parts) > 1 and math.isclose(total, math.fsum(parts))


def ranks_of(seeds: Sequence[Line]) -> list[UserRanks]:
    """Ranks of the finished seeds that recorded any."""
    paths = [cell["ranks_path"] for cell in seeds if cell["status"] == "ok"]
    return [load_ranks(path) for path in paths if isinstance(path, str)]  # pandas may turn None into NaN
