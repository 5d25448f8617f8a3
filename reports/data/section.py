"""Summary of one comparable group: a line for every row over its seeds, with quality, costs, TPME and footnotes.

Tables and figures read everything from a ``Section``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from tpme.bench.errors import UserError, nearest
from tpme.bench.quantities import Quantity, quantity
from tpme.bench.record import CellResult
from tpme.reports.data.load import Recorded, counter_values
from tpme.reports.data.metrics import over_seeds, quality
from tpme.reports.data.notes import Notes, mixing, notes_of
from tpme.reports.data.others import measured_here
from tpme.reports.data.paired_tests import Difference, differences_of
from tpme.reports.data.qualities import OF_RANKS, deciding, named, qualities_of, worst_first
from tpme.reports.data.ratios import cost_ratios, reference_row
from tpme.reports.data.resampling import Resampled, draw, resample
from tpme.reports.data.stats import Floats, interval
from tpme.reports.data.summary import line_of, ranks_of, repeats_of, seeds_of, used
from tpme.reports.data.ties import RunNoise, noise_of, tied_ranks
from tpme.reports.data.tpme import Frame, Weights, frame_of, lower_bound, tpme
from tpme.reports.data.trials import Group, Line, lines_of
from tpme.reports.data.user_ranks import METRICS, Metric, gains

NOISE_FLOOR = ("noise_time_ratio", "noise_memory_ratio")
"""Counters of a record: the noise floor of its device."""


@dataclass(frozen=True)
class Section:
    """Everything that a report says about one group."""

    name: str
    """Readable name of the group."""
    group: Group
    records: tuple[Recorded, ...]
    """The records of ``group.cells``, in its order."""
    summary: pd.DataFrame
    """One line for each row: best TPME first, then rows without one by quality, then rows that did not finish.

    Rows whose TPME noise cannot tell apart share a ``tpme_rank``. One row alone has no TPME: it would be 0 whatever it
    costs. A row that is an end of the frame in every resample, ``tpme_end``, has no interval.
    """
    behind: Mapping[str, tuple[CellResult, ...]]
    """The records of each row: its finished seeds, or its failed ones where none finished."""
    qualities: tuple[Quantity, ...]
    """What its quality is, the main one first; columns of ``summary`` with ``_sd``, ``_low`` and ``_high``."""
    gains: Mapping[Metric, Mapping[str, Floats]]
    """Recall@10 and NDCG@10 of every user, mean over seeds, for each row with ranks; shape ``(users,)``."""
    resampled: Resampled | None
    """TPME of the K rows in every draw; None without such rows."""
    weights: Weights
    frame: Frame | None
    frame_from: str | None
    """File of the frame; None for the frame of these rows."""
    notes: Notes
    reference: str | None
    """The row that ``time_ratio``, ``parameters_ratio``, ``memory_ratio`` and ``cost_ratio`` refer to."""
    noise: RunNoise
    """Decides which rows share a rank."""

    @property
    def cells(self) -> pd.DataFrame:
        """The cells of all trials, with the column ``row``."""
        return self.group.cells

    @cached_property
    def lines(self) -> dict[str, Line]:
        """The lines of the summary by row."""
        return _lines(self.summary)

    @property
    def main(self) -> Quantity | None:
        """The quality of charts and of the answer; None where the records hold none."""
        return next(iter(self.qualities), None)

    @property
    def deciding(self) -> Quantity | None:
        """The quality that orders rows; None where the records hold none."""
        return deciding(self.qualities)

    @property
    def ranked(self) -> bool:
        """Whether its rows rank items for users: recommendation."""
        return OF_RANKS[0] in self.qualities

    @property
    def parts(self) -> str:
        """What the time of one run is resampled over."""
        return "parts of the run" if "time_of" in self.group.key else "epochs"

    def quantity(self, key: str) -> Quantity:
        """The quantity of a column of its summary."""
        return next((what for what in self.qualities if what.key == key), quantity(key))

    @property
    def time_of(self) -> str:
        """What T is the time of, in a sentence: "an epoch", "250 steps"."""
        return self.group.key.get("time_of", "an epoch")

    @property
    def compared(self) -> list[str]:
        """The K rows: those with a TPME, best first."""
        return [str(name) for name in self.summary.index[self.summary["tpme"].notna()]]

    @property
    def ties(self) -> list[str]:
        """The rows that share a rank with another, best first."""
        ranks = self.summary["tpme_rank"]
        return [str(name) for name in ranks.index[ranks.notna() & ranks.duplicated(keep=False)]]

    @cached_property
    def differences(self) -> Mapping[Metric, Sequence[Difference]]:
        """Recall@10 and NDCG@10 of every pair of finished rows, tested over users.

        A user counts with the mean over the seeds of a row. A section holds one data set and one sample of its users,
        so both rows have the same users; nothing is tested where data, protocols or samples are mixed.
        """
        if {"dataset_fingerprint", "protocol", "evaluation"} & set(self.group.mixed):
            return dict.fromkeys(self.gains, ())
        return {metric: differences_of(values) for metric, values in self.gains.items()}

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
        return _largest(self.records, name)

    @cached_property
    def instruments(self) -> str:
        """How fine our instruments were: noise floor of the device, cost of harness and sampler; empty for others'."""
        if not measured_here(recorded.result for recorded in self.records):
            return ""
        time, memory = (_largest(self.records, name) for name in NOISE_FLOOR)
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
    chosen: Sequence[str] | None = None,
    frozen: tuple[Frame, str] | None = None,
    reference: str | None = None,
) -> Section:
    """Summarise one group.

    Args:
        name: readable name of the group.
        group: the cells.
        records: the records of ``group.cells``, in its order.
        weights: of T, P and M in TPME.
        chosen: rows or labels that get a TPME; None for all but baselines.
        frozen: a frame to use instead of the rows' own, and its file.
        reference: row or label that ratios of costs refer to; None for full fine-tuning, where it is there.
    """
    seeds = seeds_of(group.cells)
    ranks = {name: loaded for name, cells in seeds.items() if (loaded := ranks_of(cells))}
    lines = {row: line_of(cells) for row, cells in seeds.items()}
    qualities = qualities_of(recorded.result for recorded in records)
    summary = pd.DataFrame.from_dict(lines, orient="index").join(quality(ranks)).join(named(seeds, qualities))
    candidates = summary[_compared(summary, chosen)]
    frame = frozen[0] if frozen else frame_of(candidates, group.key)
    summary["compared"] = summary.index.isin(candidates.index)
    summary["tpme"] = tpme(candidates, weights, frame).reindex(summary.index)
    summary["tpme_lower_bound"] = lower_bound(candidates, weights, frame).reindex(summary.index)
    if summary["tpme"].count() == 1 and not frozen:
        summary[["tpme", "tpme_lower_bound"]] = np.nan
    ours = measured_here(recorded.result for recorded in records)
    noise = noise_of(candidates, *(_largest(records, name) for name in NOISE_FLOOR), ours=ours)
    summary["tpme_rank"] = tied_ranks(summary, weights, frame, noise) if frame else np.nan
    referred = reference_row(summary, reference)
    summary = summary.join(cost_ratios(summary, referred, weights))
    what = deciding(qualities)
    good = worst_first(summary[what.key], what) if what else 0.0
    keys = pd.DataFrame({"failed": summary["status"] != "ok", "tpme": summary["tpme"].round(12), "good": good})
    by = keys.assign(name=summary.index).sort_values(
        ["failed", "tpme", "good", "name"], ascending=[True, True, False, True]
    )  # NaN last
    summary = summary.loc[by.index]
    results = {str(recorded.path): recorded.result for recorded in records}
    order = [str(name) for name in summary.index]
    behind = {name: tuple(results[cell["path"]] for cell in used(seeds[name])) for name in order}
    ranked = [name for name in order if name in ranks]
    users = {
        metric: {name: np.mean([gains(seed, metric, 10) for seed in ranks[name]], axis=0) for name in ranked}
        for metric in METRICS
    }
    resampled = _resample(summary, behind, weights, frozen[0] if frozen else None)
    notes = notes_of(seeds, _lines(summary))
    if group.mixed:
        mixed = mixing(group)
        notes = replace(notes, shared=(mixed, *notes.shared), doubts=(mixed, *notes.doubts))
    frame_from = frozen[1] if frozen else None
    return Section(
        name,
        group,
        tuple(records),
        summary,
        behind,
        qualities,
        users,
        resampled,
        weights,
        frame,
        frame_from,
        notes,
        referred,
        noise,
    )


def _largest(records: Iterable[Recorded], counter: str) -> float | None:
    """The largest valid value of a counter; None where no record has one."""
    return max(counter_values((recorded.result for recorded in records), counter), default=None)


def _lines(summary: pd.DataFrame) -> dict[str, Line]:
    return dict(zip(map(str, summary.index), lines_of(summary), strict=True))


def _resample(
    summary: pd.DataFrame, behind: Mapping[str, tuple[CellResult, ...]], weights: Weights, frame: Frame | None
) -> Resampled | None:
    """Resample the rows; adds the intervals of TPME of the K rows, and of T of all rows, to ``summary``."""
    trained = summary.index[(summary["status"] == "ok") & summary["epoch_time_s"].notna()]
    repeats = {name: repeats_of(behind[name]) for name in map(str, trained)}
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
    ends = (bounds[:, 3] - bounds[:, 2]).round(6) == 0
    bounds[ends, 2:] = np.nan
    summary[["epoch_time_s_low", "epoch_time_s_high", "tpme_low", "tpme_high"]] = bounds
    summary["tpme_end"] = ends
    return resampled


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
            near = nearest(name, known)
            hint = f"did you mean '{near}'?" if near else f"there are {', '.join(known)}"
            raise UserError(f"row '{name}' is in none of these records; {hint}")
