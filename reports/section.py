"""One comparable group, summed up: a line for every row over its seeds, with quality, costs, TPME and footnotes.

``tables`` and ``plots`` draw from a ``Section`` and add nothing of their own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from tpme.bench.errors import UserError
from tpme.bench.record import CellResult
from tpme.reports.load import Recorded, load_ranks, memory_of_tpme
from tpme.reports.metrics import quality
from tpme.reports.notes import Notes, mixing, notes_of
from tpme.reports.resampling import Repeats, Resampled, resample, time_interval
from tpme.reports.tpme import Frame, Weights, frame_of, lower_bound, tpme
from tpme.reports.trials import Group

NO_ADAPTATION = ("frozen", "id", "popularity")
"""Methods that adapt no encoder: they would set the minima, so they get a TPME only where they are named."""


@dataclass(frozen=True)
class Section:
    """Everything a report says about one group."""

    name: str
    """What the rows have in common, for people."""
    group: Group
    records: tuple[Recorded, ...]
    """The records of ``group.cells``, in its order."""
    summary: pd.DataFrame
    """One line a row, best TPME first, then rows without one by quality, then what did not finish."""
    behind: Mapping[str, tuple[CellResult, ...]]
    """The records behind each row: its finished seeds, or where there are none the failed ones."""
    resampled: Resampled | None
    """TPME of the K rows in every draw; None where there are none."""
    weights: Weights
    frame: Frame | None
    frame_from: str | None
    """The file the frame was read from; None for the frame of these rows."""
    notes: Notes

    @property
    def cells(self) -> pd.DataFrame:
        """The cells of all trials, with the column ``row``."""
        return self.group.cells

    @property
    def compared(self) -> list[str]:
        """The K rows: those with a TPME, best first."""
        return [str(name) for name in self.summary.index[self.summary["tpme"].notna()]]


def make_section(
    name: str,
    group: Group,
    records: Sequence[Recorded],
    weights: Weights,
    named: Sequence[str] | None = None,
    frozen: tuple[Frame, str] | None = None,
) -> Section:
    """Sum up one group.

    Args:
        name: what the rows have in common, for people.
        group: the cells.
        records: the records of ``group.cells``, in its order.
        weights: of T, P and M in TPME.
        named: rows or labels that get a TPME; None for all methods that adapt an encoder.
        frozen: a frame to use instead of the rows' own, and the file it came from.
    """
    summary = summarise(group.cells)
    summary = summary.join(quality(_ranks(group.cells, summary)))
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
    behind = _behind(group.cells, summary, records)
    resampled = _resample(summary, behind, weights, frozen[0] if frozen else None)
    notes = notes_of(group.cells, summary)
    if group.mixed:
        notes = replace(notes, shared=(mixing(group), *notes.shared))
    frame_from = frozen[1] if frozen else None
    return Section(name, group, tuple(records), summary, behind, resampled, weights, frame, frame_from, notes)


def summarise(cells: pd.DataFrame) -> pd.DataFrame:
    """One line for each row of ``cells`` (the selected trial only): means over the seeds that finished.

    Where none did, the line holds what the failed attempts left. ``epoch_time_s_sd`` and ``memory_bytes_sd`` are
    standard deviations over seeds, NaN for one seed.
    """
    chosen = cells[cells["selected"]]
    lines = {str(name): _line(group) for name, group in chosen.groupby("row", sort=True)}
    return pd.DataFrame.from_dict(lines, orient="index")


def _line(cells: pd.DataFrame) -> dict[str, Any]:
    finished = cells[cells["status"] == "ok"]
    used = finished if len(finished) else cells
    line: dict[str, Any] = {name: cells[name].iloc[0] for name in ("label", "method", "cached", "options", "lr")}
    line["status"] = "ok" if len(finished) else cells["status"].iloc[0]
    line["seeds"] = cells["seed"].nunique()
    line["seeds_ok"] = finished["seed"].nunique()
    for name in ("epoch_time_s", "memory_bytes"):
        line[name] = _mean(used[name])
        line[f"{name}_sd"] = float(used[name].astype(float).std(ddof=1)) if len(used) > 1 else np.nan
    for name in MEANS:
        line[name] = _mean(used[name])
    line["energy_epoch_j"] = _mean(finished["training_energy_j"].astype(float) / finished["epochs_run"])
    for name in ("trainable_millions", "total_millions", "stored_bytes", "memory_seen_bytes", "cache_bytes"):
        line[name] = used[name].astype(float).max()
    for name in ("epoch_time", "memory"):
        line[f"{name}_valid"] = bool(used[f"{name}_valid"].all())
        line[f"{name}_reason"] = next((reason for reason in used[f"{name}_reason"] if isinstance(reason, str)), None)
    line["memory_source"] = ", ".join(sorted(set(used["memory_source"])))
    for name in ("search_trials", "search_cells", "search_wall_s"):
        line[name] = cells[name].iloc[0]
    return line


MEANS = (
    "time_to_best_s",
    "best_epoch",
    "epochs_run",
    "wall_s",
    "cache_build_s",
    "training_energy_j",
    "inference_items_per_s",
    "valid_recall_10",
)


def _mean(values: pd.Series[Any]) -> float:
    return float(values.astype(float).mean())


def _behind(
    cells: pd.DataFrame, summary: pd.DataFrame, records: Sequence[Recorded]
) -> dict[str, tuple[CellResult, ...]]:
    found: dict[str, list[CellResult]] = {str(name): [] for name in summary.index}
    for name, selected, recorded in zip(cells["row"], cells["selected"], records, strict=True):
        if selected and (summary["status"][name] != "ok" or recorded.result.status == "ok"):
            found[name].append(recorded.result)
    return {name: tuple(results) for name, results in found.items()}


def _resample(
    summary: pd.DataFrame, behind: Mapping[str, tuple[CellResult, ...]], weights: Weights, frame: Frame | None
) -> Resampled | None:
    """Resample the rows; adds ``tpme_low`` and ``tpme_high`` of the K rows to ``summary``, and the same of T of all."""
    summary[["epoch_time_s_low", "epoch_time_s_high", "tpme_low", "tpme_high"]] = np.nan
    trained = summary.index[(summary["status"] == "ok") & summary["epoch_time_s"].notna()]
    every = {name: _repeats(behind[name]) for name in map(str, trained)}
    for name, row in every.items():
        if row.several:
            summary.loc[name, ["epoch_time_s_low", "epoch_time_s_high"]] = time_interval(name, row.epochs_s)
    repeats = {name: row for name, row in every.items() if pd.notna(summary["tpme"][name])}
    if not repeats:
        return None
    resampled = resample(repeats, weights, frame)
    for name, row in repeats.items():
        if row.several:
            value = float(summary["tpme"][name])
            summary.loc[name, ["tpme_low", "tpme_high"]] = resampled.interval(name, value)
    return resampled


def _repeats(seeds: Sequence[CellResult]) -> Repeats:
    """What is repeated of a row that trained; its M is NaN where it is not known."""
    times: list[list[float | None]] = [
        [epoch.train_s for epoch in result.epochs[result.warmup_epochs :]] or [result.epoch_time_s.value]
        for result in seeds
    ]
    memory = [memory_of_tpme(result.training_memory, result.cell.device).value for result in seeds]
    return Repeats(
        epochs_s=tuple(np.array(one, dtype=np.float64) for one in times),
        memory_bytes=np.array(memory, dtype=np.float64),
        trainable_millions=max(result.parameters.trainable for result in seeds if result.parameters) / 1e6,
    )


def _ranks(cells: pd.DataFrame, summary: pd.DataFrame) -> dict[str, list[Any]]:
    """Ranks of the finished seeds of every row that has any."""
    shown = cells[cells["selected"] & (cells["status"] == "ok") & cells["ranks_path"].notna()]
    return {
        str(name): [load_ranks(path) for path in shown.loc[shown["row"] == name, "ranks_path"]]
        for name in summary.index
        if (shown["row"] == name).any()
    }


def _compared(summary: pd.DataFrame, named: Sequence[str] | None) -> pd.Series[bool]:
    if named is None:
        return ~summary["method"].isin(NO_ADAPTATION)
    return summary["label"].isin(named) | pd.Series(summary.index.isin(named), index=summary.index)


def parse_rows(text: str) -> list[str]:
    """The names in ``"fft,lora [rank=4,alpha=8]"``: commas inside brackets belong to a name."""
    return [name.strip() for name in re.split(r",(?![^\[]*\])", text) if name.strip()]


def check_rows(named: Sequence[str], groups: Sequence[Group]) -> None:
    """Raise UserError, with the nearest name, for a row that is in none of the groups."""
    known = sorted({str(name) for group in groups for column in ("row", "label") for name in group.cells[column]})
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise UserError(f"row '{name}' is in none of these records; {hint}")
