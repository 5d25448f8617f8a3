"""Summary of one comparable group: a line for every row over its seeds, with quality, costs, TPME and footnotes.

Tables and figures read everything from a ``Section``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tpme.bench.errors import UserError
from tpme.bench.quantities import memory_reading
from tpme.bench.record import CellResult
from tpme.reports.data.load import Recorded, counter_values
from tpme.reports.data.metrics import over_seeds, quality, spread
from tpme.reports.data.notes import Notes, mixing, notes_of
from tpme.reports.data.ranks import METRICS, Metric, Ranks, gains, load_ranks
from tpme.reports.data.resampling import Repeats, Resampled, draw, resample
from tpme.reports.data.stats import Floats, interval
from tpme.reports.data.tpme import Frame, Weights, frame_of, lower_bound, tpme
from tpme.reports.data.trials import Group, Line, lines_of


@dataclass(frozen=True)
class Section:
    """Everything that a report says about one group."""

    name: str
    """Readable name of the group."""
    group: Group
    records: tuple[Recorded, ...]
    """The records of ``group.cells``, in its order."""
    summary: pd.DataFrame
    """One line for each row: best TPME first, then rows without one by quality, then rows that did not finish."""
    behind: Mapping[str, tuple[CellResult, ...]]
    """The records of each row: its finished seeds, or its failed ones where none finished."""
    gains: Mapping[Metric, Mapping[str, Floats]]
    """Recall@10 and NDCG@10 of every user, mean over seeds, for each row with ranks; shape ``(users,)``."""
    resampled: Resampled | None
    """TPME of the K rows in every draw; None without such rows."""
    weights: Weights
    frame: Frame | None
    frame_from: str | None
    """File of the frame; None for the frame of these rows."""
    notes: Notes

    @property
    def cells(self) -> pd.DataFrame:
        """The cells of all trials, with the column ``row``."""
        return self.group.cells

    @cached_property
    def lines(self) -> dict[str, Line]:
        """The lines of the summary by row."""
        return _lines(self.summary)

    @property
    def compared(self) -> list[str]:
        """The K rows: those with a TPME, best first."""
        return [str(name) for name in self.summary.index[self.summary["tpme"].notna()]]

    def firsts(self, *, sampled: bool = False) -> dict[str, Recorded]:
        """The first seed of every row, a finished one if any; with ``sampled``, of those that left samples."""

        def order(recorded: Recorded) -> tuple[bool, int, Path]:
            return recorded.result.status != "ok", recorded.result.cell.seed, recorded.path

        firsts: dict[str, Recorded] = {}
        for name, selected, recorded in zip(self.cells["row"], self.cells["selected"], self.records, strict=True):
            usable = selected and not (sampled and recorded.beside("samples") is None)
            if usable and (name not in firsts or order(recorded) < order(firsts[name])):
                firsts[name] = recorded
        return {name: firsts[name] for name in self.lines if name in firsts}

    def counters(self, names: Iterable[str]) -> pd.DataFrame:
        """Counters of every row: a column for the mean over seeds of each and one for ``<name>_sd``."""
        pairs = ((row, name) for name in names for row in self.lines)
        return over_seeds(self.lines, {(row, name): counter_values(self.behind[row], name) for row, name in pairs})

    def counter(self, name: str) -> float | None:
        """The largest valid value of a counter over all records; None where none has one."""
        return max(counter_values((recorded.result for recorded in self.records), name), default=None)

    @cached_property
    def instruments(self) -> str:
        """How fine the instruments were: noise floor of the device, cost of harness and sampler."""
        time, memory = self.counter("noise_time_ratio"), self.counter("noise_memory_ratio")
        overhead, sampler = self.counter("overhead_ratio"), self.counter("sampler_core_share")
        several = len({recorded.device_key for recorded in self.records}) > 1
        text = f"Noise floor of {'the noisiest of these devices' if several else 'this device'}: "
        if time is None or memory is None:
            text += "not measured (tpme doctor --noise)"
        else:
            text += f"time ±{time:.1%}, memory ±{memory:.1%} between runs of the same cell"
        if overhead is not None:
            text += f"; the harness adds {overhead:.2%} to an epoch"
        if sampler is not None:
            text += f"; the sampler took at most {sampler:.1%} of one core"
        return text.replace("%", " %") + "."


def make_section(
    name: str,
    group: Group,
    records: Sequence[Recorded],
    weights: Weights,
    named: Sequence[str] | None = None,
    frozen: tuple[Frame, str] | None = None,
) -> Section:
    """Summarise one group.

    Args:
        name: readable name of the group.
        group: the cells.
        records: the records of ``group.cells``, in its order.
        weights: of T, P and M in TPME.
        named: rows or labels that get a TPME; None for all but baselines.
        frozen: a frame to use instead of the rows' own, and its file.
    """
    seeds = _seeds(group.cells)
    ranks = {name: loaded for name, cells in seeds.items() if (loaded := _ranks(cells))}
    lines = {row: _line(cells) for row, cells in seeds.items()}
    summary = pd.DataFrame.from_dict(lines, orient="index").join(quality(ranks))
    candidates = summary[_compared(summary, named)]
    frame = frozen[0] if frozen else frame_of(candidates, group.key)
    summary["compared"] = summary.index.isin(candidates.index)
    summary["tpme"] = tpme(candidates, weights, frame).reindex(summary.index)
    summary["tpme_lower_bound"] = lower_bound(candidates, weights, frame).reindex(summary.index)
    summary["tpme_rank"] = summary["tpme"].round(12).rank(method="min")
    summary = summary.assign(order=summary["status"] != "ok", name=summary.index).sort_values(
        ["order", "tpme_rank", "ndcg_10", "name"], ascending=[True, True, False, True], na_position="last"
    )
    summary = summary.drop(columns=["order", "name"])
    results = {str(recorded.path): recorded.result for recorded in records}
    order = [str(name) for name in summary.index]
    behind = {name: tuple(results[cell["path"]] for cell in _used(seeds[name])) for name in order}
    ranked = [name for name in order if name in ranks]
    users = {
        metric: {name: np.mean([gains(seed, metric, 10) for seed in ranks[name]], axis=0) for name in ranked}
        for metric in METRICS
    }
    resampled = _resample(summary, behind, weights, frozen[0] if frozen else None)
    notes = notes_of(seeds, _lines(summary))
    if group.mixed:
        notes = replace(notes, shared=(mixing(group), *notes.shared))
    frame_from = frozen[1] if frozen else None
    return Section(name, group, tuple(records), summary, behind, users, resampled, weights, frame, frame_from, notes)


def _lines(summary: pd.DataFrame) -> dict[str, Line]:
    return dict(zip(map(str, summary.index), lines_of(summary), strict=True))


def _seeds(cells: pd.DataFrame) -> dict[str, list[Line]]:
    """The cells of the selected trial of each row, rows by name."""
    rows: dict[str, list[Line]] = {}
    for cell in lines_of(cells[cells["selected"]]):
        rows.setdefault(cell["row"], []).append(cell)
    return dict(sorted(rows.items()))


def _used(seeds: Sequence[Line]) -> Sequence[Line]:
    """The seeds that finished, or all where none did."""
    return [cell for cell in seeds if cell["status"] == "ok"] or seeds


def _line(seeds: Sequence[Line]) -> dict[str, Any]:
    """The line of a row: means over its finished seeds, or what the failed attempts left where none finished.

    ``epoch_time_s_sd`` and the like are standard deviations over seeds, NaN for one seed.
    """
    used = _used(seeds)
    finished = used if used[0]["status"] == "ok" else []
    line: dict[str, Any] = {name: seeds[0][name] for name in SHARED}
    line["status"] = used[0]["status"]
    line["seeds"] = len({cell["seed"] for cell in seeds})
    line["seeds_ok"] = len({cell["seed"] for cell in finished})
    for name in MEANS:
        line[name] = _mean(_values(used, name))
    for name in VARIED:
        line[f"{name}_sd"] = _spread(_values(used, name))
    energy = _values(finished, "energy_epoch_j")
    line["energy_epoch_j"], line["energy_epoch_j_sd"] = _mean(energy), _spread(energy)
    for name in ("trainable_millions", "total_millions", "stored_bytes", "memory_seen_bytes", "cache_bytes"):
        line[name] = float(np.fmax.reduce(_values(used, name)))
    for name in ("epoch_time", "memory"):
        line[f"{name}_valid"] = all(cell[f"{name}_valid"] for cell in used)
        reasons = (cell[f"{name}_reason"] for cell in used)
        line[f"{name}_reason"] = next((reason for reason in reasons if isinstance(reason, str)), None)
    line["memory_source"] = ", ".join(sorted({cell["memory_source"] for cell in used}))
    return line


SHARED = ("label", "method", "baseline", "cached", "options", "lr", "search_trials", "search_cells", "search_wall_s")
VARIED = (
    *("epoch_time_s", "all_in_s", "memory_bytes", "time_to_best_s", "wall_s", "training_energy_j"),
    "inference_items_per_s",
)
"""Values reported with their standard deviation over seeds."""
MEANS = (*VARIED, "cache_build_s", "best_epoch", "epochs_run", "valid_recall_10")  # seeds share one cache build


def _values(cells: Sequence[Line], name: str) -> Floats:
    """One number of every cell, NaN where it is missing."""
    return np.array([cell[name] for cell in cells], dtype=np.float64)


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _spread(values: Floats) -> float:
    return spread(values[~np.isnan(values)])


def _resample(
    summary: pd.DataFrame, behind: Mapping[str, tuple[CellResult, ...]], weights: Weights, frame: Frame | None
) -> Resampled | None:
    """Resample the rows; adds the intervals of TPME of the K rows, and of T of all rows, to ``summary``."""
    trained = summary.index[(summary["status"] == "ok") & summary["epoch_time_s"].notna()]
    repeats = {name: _repeats(behind[name]) for name in map(str, trained)}
    draws = {name: draw(name, row) for name, row in repeats.items()}
    tpme = summary["tpme"].dropna().to_dict()
    compared = {name: costs for name, costs in draws.items() if name in tpme}
    resampled = resample(compared, weights, frame) if compared else None
    bounds = np.full((len(summary), 4), np.nan)
    for place, name in enumerate(summary.index):
        if name in repeats and repeats[name].several:
            bounds[place, :2] = interval(draws[name][:, 0])  # of T
            if resampled is not None and name in compared:
                bounds[place, 2:] = resampled.interval(name, tpme[name])
    summary[["epoch_time_s_low", "epoch_time_s_high", "tpme_low", "tpme_high"]] = bounds
    return resampled


def _repeats(seeds: Sequence[CellResult]) -> Repeats:
    """Repeated measurements of a row that trained; M is NaN where it is unknown."""
    times: list[list[float | None]] = [
        [epoch.train_s for epoch in result.epochs[result.warmup_epochs :]] or [result.epoch_time_s.value]
        for result in seeds
    ]
    memory = [memory_reading("memory_bytes", result.training_memory, result.cell.device).value for result in seeds]
    return Repeats(
        epochs_s=tuple(np.array(seconds, dtype=np.float64) for seconds in times),
        memory_bytes=np.array(memory, dtype=np.float64),
        trainable_millions=max((seed.parameters.trainable for seed in seeds if seed.parameters), default=np.nan) / 1e6,
    )


def _ranks(seeds: Sequence[Line]) -> list[Ranks]:
    """Ranks of the finished seeds that recorded any."""
    paths = [cell["ranks_path"] for cell in seeds if cell["status"] == "ok"]
    return [load_ranks(path) for path in paths if isinstance(path, str)]  # pandas may turn None into NaN


def _compared(summary: pd.DataFrame, named: Sequence[str] | None) -> pd.Series[bool]:
    if named is None:
        return ~summary["baseline"]  # they would set the minima
    return summary["label"].isin(named) | pd.Series(summary.index.isin(named), index=summary.index)


def parse_rows(text: str) -> list[str]:
    """The names in ``"fft,lora [rank=4,alpha=8]"``: commas inside brackets belong to a name."""
    return [name.strip() for name in re.split(r",(?![^\[]*\])", text) if name.strip()]


def check_rows(named: Sequence[str], groups: Sequence[Group]) -> None:
    """Raise UserError, with the nearest name, for a row that no group has."""
    known = sorted({str(name) for group in groups for column in ("row", "label") for name in group.cells[column]})
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise UserError(f"row '{name}' is in none of these records; {hint}")
