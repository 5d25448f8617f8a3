"""The table of inference: what serving the adapted model of every row costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from tpme.bench.quantities import MISSING, byte_unit, quantity, rate_text
from tpme.bench.record import CellResult
from tpme.reports.data.section import Section
from tpme.reports.data.serving import TIMED, facts_of, inference_costs, served, unmeasured
from tpme.reports.data.trials import Line
from tpme.reports.tables import fields
from tpme.reports.tables.fields import Field
from tpme.reports.tables.table import Column, Entry, Table

HELD, ALLOCATED, LOADED, DELTA = (
    "inference_held_bytes", "inference_allocated_bytes", "inference_loaded_bytes", "stored_bytes",
)  # fmt: skip


def inference(section: Section) -> Table:
    """FLOPs an item, items a second, latency of a user, memory, bytes to load and to keep; rows that measured it."""
    rows = served(section.behind)
    frame = inference_costs(section.behind).drop(columns=["inference_flops_sd", f"{LOADED}_sd"])  # exact
    frame[DELTA] = section.summary[DELTA].reindex(frame.index)
    size, delta = byte_unit(frame[[HELD, ALLOCATED, LOADED]].max()), byte_unit(frame[DELTA])
    cost = partial(fields.cost, section, frame=frame)
    columns = [fields.method(section), *cost("inference_flops")]
    columns += _timed(section, frame, "inference_items_per_s_1", "items/s, one by one")
    columns += _timed(section, frame, "inference_items_per_s", f"items/s, {_batches(rows)} at a time")
    columns += _timed(section, frame, "inference_user_s")
    columns += cost(HELD, unit=size)
    if not frame[HELD].equals(frame[ALLOCATED]):  # on a CPU both are the resident memory
        columns += cost(ALLOCATED, unit=size)
    columns += [*cost(LOADED, unit=size), *cost(DELTA, unit=delta, header=f"Delta ({delta[0]})")]
    return fields.table_of(section, "inference", "Inference", columns, frame.index, _notes(section, rows, frame))


def _timed(section: Section, frame: pd.DataFrame, key: str, header: str | None = None) -> list[Field]:
    """The median with its quartiles; programs get these and the number of runs as columns."""
    what, ends = quantity(key), ("_low", "_high", "_runs")
    values, low, high, runs = (frame[f"{key}{end}"].astype(float).to_dict() for end in ("", *ends))
    unit, scale = what.scale(values.values())
    compared = pd.Series({name: values[name] for name in section.compared if name in values}, dtype=float)
    best = fields.best_rows(compared, what.better) if what.better else set()

    def entry(name: str, line: Line) -> Entry:
        if not runs[name]:
            return Entry(MISSING)
        median, *quartiles = (rate_text(value[name] / scale) for value in (values, low, high))
        return Entry(f"{median} ({'–'.join(quartiles)})", values[name], name in best, short=median)

    def hidden(end: str, of: Mapping[Any, float]) -> Field:
        return Column(f"{key}{end}", machine_only=True), lambda name, _: Entry("", fields.value_of(of[name]))

    column = Column(key, header or what.label(unit), what.better)
    return [(column, entry), *map(hidden, ends, (low, high, runs))]


def _batches(rows: Mapping[str, Sequence[CellResult]]) -> str:
    """Items of a batch; several numbers where catalogues smaller than a batch are mixed."""
    sizes = {facts_of(seed).batch.size for seeds in rows.values() for seed in seeds}
    return " or ".join(map(str, sorted(sizes)))


def _notes(section: Section, rows: Mapping[str, Sequence[CellResult]], frame: pd.DataFrame) -> list[str]:
    runs = {int(value) for key in TIMED for value in frame[f"{key}_runs"] if value}
    times = " to ".join(map(str, sorted({min(runs), max(runs)}))) if runs else "no"
    notes = [
        "The model as it is served, merged where its method merges, in the precision of its training. FLOPs: matrix "
        "products and convolutions, 1 multiply-add = 2 FLOPs, counted while real items were encoded. Times: median "
        f"(quartiles) of {times} runs, inputs on the device already. User: sequential encoder over the history, scores "
        "of the whole catalogue and top 10, for one user.",
        "Memory: peak of a phase of its own. Loaded: all parameters and buffers, and tables of hidden states where a "
        "row reads them. Delta: what must be kept beside the untouched encoders.",
    ]
    given = [name for name, seeds in rows.items() if any(facts_of(seed).looked_up for seed in seeds)]
    if given:
        notes.append(f"From a table of hidden states, so new items cost their encoders, too: {', '.join(given)}.")
    by_data = [name for name, seeds in rows.items() if any(facts_of(seed).flops_by_data for seed in seeds)]
    if by_data:
        notes.append(f"FLOPs differ from item to item, mean over a batch: {', '.join(by_data)}.")
    return notes + list(unmeasured(section.behind))
