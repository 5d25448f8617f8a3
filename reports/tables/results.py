"""The tables of a report, built from a ``Section``; ``table.py`` renders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import get_args

import pandas as pd

from tpme.bench.quantities import CUTOFFS, MISSING, byte_unit, bytes_text, number, quantity
from tpme.bench.record import LearningRates, PhaseKind
from tpme.reports.data.others import measured_here, notes_of_others
from tpme.reports.data.phase_times import phase_times
from tpme.reports.data.section import Section
from tpme.reports.data.serving import served
from tpme.reports.data.stats import LEVEL
from tpme.reports.data.user_ranks import METRICS
from tpme.reports.tables import fields
from tpme.reports.tables.differences import pairs
from tpme.reports.tables.differences import table as differences
from tpme.reports.tables.fields import Field, table_of, value_of
from tpme.reports.tables.machines import machines
from tpme.reports.tables.paper import paper
from tpme.reports.tables.planned import planned
from tpme.reports.tables.representation_space import representation_space
from tpme.reports.tables.scales import scales
from tpme.reports.tables.searches import searches
from tpme.reports.tables.serving_costs import inference
from tpme.reports.tables.table import Column, Entry, Table

COLLECTIVES = "collective_s"
"""A part of a step only of rows on several devices."""
STEP_PARTS = ("data_wait_s", "forward_s", "backward_s", "update_s")
"""The parts of a training step, as counters of a record."""
_WHOLE = {
    "time_to_best_s": "To best epoch: all time up to it, building a feature cache included.",
    "all_in_s": "All in: the whole time of training.",
}
_OTHER = ("the parts of a run", "evaluation and all the rest", "model")
_PEAK = " Peak: of the whole run, from loading to {}, with its phase where that is shown."
OVER_SEEDS = "Means over seeds, ± their standard deviation where there are several."


def all_tables(section: Section) -> list[Table]:
    """Every table with rows, results first."""
    return [table for table in (make(section) for make in TABLES.values()) if table.rows]


def results(section: Section) -> Table:
    """The main table: quality, time, memory and cost of every row; the other tables hold the rest."""
    unit = byte_unit(section.summary[["memory_seen_bytes", "peak_bytes"]].max())
    columns = [
        fields.method(section),
        fields.hidden("status"),  # people read it in place of the quality
        fields.seeds(),
        *(field for what in section.qualities for field in fields.quality(section, what.key)),
        *fields.cost(section, "epoch_time_s"),
        *fields.cost(section, _whole_time(section)),
        *fields.cost(section, "trainable_millions"),
        *fields.memory(section, unit),
        *fields.peak(section, unit),
        *fields.ratio(section, "cost_ratio"),
        *fields.tpme(section),
    ]
    return table_of(section, "results", "Quality and cost of every method", columns, notes=_result_notes(section))


def cutoffs(section: Section) -> Table:
    """Recall and NDCG at every cut-off, with their spread over seeds."""
    columns = [fields.method(section)]
    for k in CUTOFFS:
        for metric in METRICS:
            columns += fields.quality(section, f"{metric}_{k}", seeds=True)
    note = f"Mean over seeds ± half the {100 * LEVEL:.0f} % bootstrap interval over users."
    if (section.summary["seeds_ok"] > 1).any():
        note += " ± seeds: standard deviation over seeds, which is not in that interval."
    return table_of(section, "cutoffs", "Quality at all cut-offs", columns, _ranked(section), [note])


def warm_and_cold(section: Section) -> Table:
    """Quality for targets that occur in training and for targets that do not."""
    columns = [fields.method(section)]
    for part in ("warm", "cold"):
        for metric in METRICS:
            columns += fields.quality(section, f"{metric}_10_{part}")
    columns += [fields.count("users"), fields.count("users_cold"), fields.percent("cannot_hit")]
    note = "Cold: the target never occurs in training. Cannot hit: it is masked because the user already had it."
    return table_of(section, "warm-cold", "Warm and cold targets", columns, _ranked(section), [note])


def costs(section: Section) -> Table:
    """Costs of a row beside T, P and M."""
    summary, cost = section.summary, partial(fields.cost, section)
    columns = [
        fields.method(section),
        *fields.interval("epoch_time_s"),
        fields.count("best_epoch"),
        _parts(section),
        *cost("wall_s"),
        *cost("total_millions"),
        *cost("stored_bytes"),
    ]
    rare = ["memory_sum_bytes"] + (["all_in_s"] if _whole_time(section) != "all_in_s" else [])
    rare += ["energy_epoch_j", "training_energy_j", "cache_build_s", "cache_peak_bytes", "cache_bytes"]
    rare += [] if served(section.behind) else ["inference_items_per_s"]  # of records from before it had its own table
    for key in rare:
        columns += cost(key) if summary[key].notna().any() else []
    if (summary["search_trials"] > 1).any():
        columns += [fields.count("search_trials"), *cost("search_wall_s")]
    parts, whole, model = ("epochs after warm-up", "validation and ranking", "encoders") if section.ranked else _OTHER
    notes = [
        f"{OVER_SEEDS} T with a percentage: where it lies in so many resamplings of seeds and of {parts}. "
        f"Whole cell: loading, {whole} included. Stored: what must be kept beside the untouched {model}."
    ]
    if summary["memory_sum_bytes"].notna().any():
        notes.append("M, all: memory of all devices together; M is that of the device with the most, E that of all.")
    if summary["all_in_s"].notna().any() and section.ranked:
        notes.append("All in: feature cache, a method's estimation, search and rounds, training epochs of all stages.")
    if summary["energy_epoch_j"].notna().any():
        notes.append("E: energy of a training epoch by the GPU's counter, mean of all epochs; the host's is not in it.")
    return table_of(section, "costs", "Costs in full", columns, notes=notes)


def steps(section: Section) -> Table:
    """Where a training step goes: forward and backward propagation and weight update, medians, mean over seeds."""
    times = section.counters((*STEP_PARTS, COLLECTIVES))
    rows = times.index[times.notna().any(axis=1)]
    parts = [*STEP_PARTS, *([COLLECTIVES] if times[COLLECTIVES].notna().any() else [])]
    columns = [fields.method(section), *(field for key in parts for field in fields.cost(section, key, times))]
    note = (
        "Medians over a few steps in a pass of its own after training. FP: forward propagation and loss, BP: backward "
        f"propagation, WU: weight update. {OVER_SEEDS}"
    )
    if COLLECTIVES in parts:
        note += " Collectives: of FP and BP of rank 0 the time of waiting for other ranks and for what they send."
    return table_of(section, "steps", "Where a training step goes", columns, rows, notes=[note])


def phases(section: Section) -> Table:
    """Wall time by kind of phase, mean over the finished seeds; the peak memory of each goes to CSV and JSON."""
    times = phase_times(section)
    kinds = [kind for kind in get_args(PhaseKind) if f"{kind}_s" in times]

    def peak(kind: str) -> Field:
        key = f"{kind}_peak_bytes"
        return Column(key, machine_only=True), lambda name, _: Entry("", value_of(times.at[name, key]))

    columns = [fields.method(section)]
    for kind in kinds:
        columns += fields.cost(section, f"{kind}_s", times, header=kind)
    columns += [*fields.cost(section, "wall_s", header="whole cell"), *map(peak, kinds)]
    return table_of(section, "phases", "Where the time goes (seconds by phase)", columns, times.index, [OVER_SEEDS])


def learning_rates(section: Section) -> Table:
    """Learning rates of every row that trains, with all trials and their cost; empty where all are the same."""
    cells = _in_order(section, section.cells[(section.cells["epochs_run"] > 0) | (section.cells["status"] != "ok")])
    searched = bool((cells["search_trials"] > 1).any())
    if cells["lr"].nunique() < 2:
        cells = cells.head(0)
    rates = [LearningRates.model_validate_json(str(lr)) for lr in cells["lr"].unique()]
    groups = sorted({group for rate in rates for group in rate.by_group()})
    lines = []
    for (name, lr), trial in cells.groupby(["row", "lr"], sort=False):
        validation, finished = trial["trial_valid_recall_10"].iloc[0], int((trial["status"] == "ok").sum())
        chosen, wall_s = bool(trial["selected"].iloc[0]), float(trial["wall_s"].sum())
        lines.append(
            (
                Entry(str(name), str(name), chosen),
                *(Entry(f"{rate:g}", rate) for rate in map(LearningRates.model_validate_json(str(lr)).of, groups)),
                Entry(f"{finished} of {len(trial)}", finished),
                Entry(quantity("valid_recall_10").format(validation), value_of(validation)),
                Entry(number(wall_s), wall_s),
                Entry("✓" if chosen else "", chosen),
            )
        )
    columns = (
        Column("method", "Method", numeric=False),
        *(
            Column(f"lr_{group}", f"lr {group}", machine_only=len({rate.of(group) for rate in rates}) == 1)
            for group in groups
        ),
        Column("cells_finished", "Finished", fact=True),
        Column("valid_recall_10", "Validation Recall@10", "higher"),
        Column("wall_s", "Cost (s)"),
        Column("selected", "Selected", numeric=False),
    )
    note = "Selected on validation alone; the test results of the other trials are not looked at."
    return Table("lr", "Learning rates", columns, tuple(lines), (note,) if searched else (), subject=section.name)


def failures(section: Section) -> Table:
    """Every attempt that did not end ``ok``, unselected trials included."""
    by_path = {str(recorded.path): recorded.result for recorded in section.records}
    validation = (quantity("valid_recall_10"),) if section.ranked else ()
    lines = []
    for _, cell in _in_order(section, section.cells[section.cells["status"] != "ok"]).iterrows():
        failure = by_path[cell["path"]].failure
        assert failure is not None  # the schema demands one of every status but ok
        lines.append(
            (
                Entry(cell["row"], cell["row"]),
                Entry(str(cell["seed"]), int(cell["seed"])),
                Entry(str(cell["lr_trial"]), int(cell["lr_trial"])),
                Entry(cell["status"], cell["status"]),
                Entry(failure.phase, failure.phase),
                *(Entry(MISSING if at is None else str(at), at) for at in (failure.epoch, failure.step)),
                Entry(bytes_text(failure.bytes_requested), failure.bytes_requested),
                Entry(bytes_text(cell["memory_seen_bytes"]), value_of(cell["memory_seen_bytes"])),
                *(Entry(what.format(cell[what.key]), value_of(cell[what.key])) for what in validation),
                Entry(number(cell["wall_s"]), float(cell["wall_s"])),
                Entry(failure.message, failure.message),
            )
        )
    columns = (
        Column("method", "Method", numeric=False),
        Column("seed", "Seed"),
        Column("lr_trial", "lr trial"),
        Column("status", "End", numeric=False),
        Column("phase", "Phase", numeric=False),
        Column("epoch", "Epoch"),
        Column("step", "Step"),
        Column("bytes_requested", "Asked for"),
        Column("memory_seen_bytes", "Memory seen"),
        *(Column(what.key, "Validation Recall@10") for what in validation),
        Column("wall_s", "After (s)"),
        Column("message", "What happened", numeric=False),
    )
    return Table("failures", "What did not finish", columns, tuple(lines), subject=section.name)


TABLES: dict[str, Callable[[Section], Table]] = {
    "results": results,
    "tpme": scales,
    "differences": differences,
    "pairs": pairs,
    "cutoffs": cutoffs,
    "warm-cold": warm_and_cold,
    "costs": costs,
    "steps": steps,
    "plan": planned,
    "inference": inference,
    "representation": representation_space,
    "phases": phases,
    "paper": paper,
    "searches": searches,
    "lr": learning_rates,
    "failures": failures,
    "environment": machines,
}
"""Builders of the tables by name, in display order."""


# --- which rows and cells ------------------------------------------------------------------------------------


def _ranked(section: Section) -> list[str]:
    return [str(name) for name in section.summary.index[section.summary["ndcg_10"].notna()]]


def _in_order(section: Section, cells: pd.DataFrame) -> pd.DataFrame:
    """Cells in the order of the rows of the summary, then by trial and seed."""
    position = {name: index for index, name in enumerate(section.summary.index)}
    return cells.assign(position=cells["row"].map(position)).sort_values(["position", "lr_trial", "lr", "seed"])


def _parts(section: Section) -> Field:
    """The number of epochs, or of the parts of a run whose T is of something else."""
    column, entry = fields.count("epochs_run")
    return (replace(column, header="Parts") if "time_of" in section.group.key else column), entry


def _has_peak(section: Section) -> bool:
    return bool(section.summary["peak_bytes"].notna().any())


def _whole_time(section: Section) -> str:
    """The time beside T: that to the best epoch, or where no epoch is the best, all of it."""
    return "time_to_best_s" if section.summary["time_to_best_s"].notna().any() or section.ranked else "all_in_s"


def _result_notes(section: Section) -> list[str]:
    """The columns explained, TPME before it appears, and why rows have none."""
    summary, several = section.summary, bool((section.summary["seeds_ok"] > 1).any())
    results = [recorded.result for recorded in section.records]
    notes = [*notes_of_others(results)]
    if section.ranked:
        spread = ", of costs the standard deviation over seeds" if several else ""
        notes.append(
            "Recall@10: share of users whose held-out item is among the first 10; NDCG@10 weighs its place, too. "
            f"±, where shown: half the {100 * LEVEL:.0f} % interval over users{spread}."
        )
    elif several:
        notes.append("±: standard deviation over seeds.")
    if measured_here(results):
        notes.append(
            f"T: time of {section.time_of.replace('an epoch', 'a training epoch')}. "
            f"{_WHOLE[_whole_time(section)]} "
            "P: trainable parameters. M: peak memory of training."
            + (_PEAK.format("ranking and export") if section.ranked else _PEAK.format("its end") * _has_peak(section))
        )
    if section.compared:
        rows = f"the rows of {section.frame_from}" if section.frame_from else f"{len(section.compared)} compared rows"
        notes.append(
            f"TPME: mean of T, P and M (weights {str(section.weights).replace(',', ', ')}), each from 0 % for the "
            f"least of {rows} to 100 % for the most."
        )
    else:
        alone = summary["compared"] & (summary["status"] == "ok")
        notes.append(
            f"No TPME: of one row, {summary.index[alone][0]}, it would be 0 whatever it costs."
            if alone.sum() == 1 and section.frame is not None
            else "No row has a TPME: none that adapts an encoder finished with a trusted T, P and M."
        )
    if section.reference is not None:
        notes.append(
            f"Cost / {section.reference}: geometric mean of the ratios of T, P and M to {section.reference}'s, same "
            "weights; no other row moves it."
        )
    if section.ties:
        tied = "is tied within noise with the first of them" if section.noise.source else "has the same TPME"
        notes.append(f"Each of the rows that share a rank (=) {tied}.")
    left_out = summary.index[~summary["compared"] & summary["baseline"]]
    if len(left_out):
        notes.append(f"No TPME, as no encoder is adapted: {', '.join(map(str, left_out))}.")
    return notes
