"""Plan against measured: what a cell must hold and compute by its counters, beside the peak that was measured."""

from __future__ import annotations

from functools import partial

import pandas as pd

from tpme.bench.record import CellResult, Reading
from tpme.reports.data.load import counter_values
from tpme.reports.data.section import Section
from tpme.reports.data.trials import lines_of
from tpme.reports.tables import fields
from tpme.reports.tables.fields import byte_unit
from tpme.reports.tables.table import Table

PARTS = {
    "weight_bytes": "Weights",
    "gradient_bytes": "Gradients",
    "optimizer_bytes": "Optimiser",
    "saved_bytes": "Saved",
}
"""Counters of memory, in the order in which a step needs it, and their headers."""
PEAK = "planned_peak_bytes"


def planned(section: Section) -> Table:
    """Memory by its parts, planned and measured peak, FLOPs of a step; rows whose counters are known."""
    names = (*PARTS, PEAK, "forward_flops", "backward_flops", "mfu")
    known = {(name, key): counter_values(shown, key) for name, shown in section.behind.items() for key in names}
    rows = [name for name in section.lines if known[name, "weight_bytes"]]
    if not rows:
        return fields.table_of(section, "plan", "Plan against measured", [fields.method(section)], ())
    peaks = {name: _measured(section.behind[name]) for name in rows}
    frame = pd.DataFrame.from_dict(fields.over_seeds(known), orient="index").loc[rows]
    frame = frame.drop(columns=[f"{key}_sd" for key in (*PARTS, PEAK)])  # counted, so the same in all
    frame["measured_peak_bytes"] = pd.Series({name: peak and peak.value for name, peak in peaks.items()}, dtype=float)
    frame["flops"] = frame["forward_flops"] + frame["backward_flops"]
    unit, scale = byte_unit(frame[[*PARTS, "measured_peak_bytes"]].max())
    flop, per = ("TFLOP", 1e12) if frame["flops"].max() >= 1e12 else ("GFLOP", 1e9)
    frame["peak_ratio"] = frame["measured_peak_bytes"] / frame[PEAK]
    frame["mfu_percent"], frame["mfu_percent_sd"] = 100 * frame["mfu"], 100 * frame["mfu_sd"]
    cost = partial(fields.cost, section, of=dict(zip(rows, lines_of(frame), strict=True)))
    made = [fields.method(section)]
    for key, header in PARTS.items():
        made += cost(key, f"{header} ({unit})", scale=scale)
    if frame[PEAK].notna().any():
        made += cost(PEAK, f"Peak, plan ({unit})", scale=scale)
        made += cost("measured_peak_bytes", f"measured ({unit})", scale=scale)
        made += cost("peak_ratio", "Ratio", better=None)
    made += cost("flops", f"{flop}/step", scale=per)
    if frame["mfu"].notna().any():
        made += cost("mfu_percent", "MFU (%)", better="higher")
    title = "Plan against measured" if frame[PEAK].notna().any() else "What a training step needs, by its counters"
    return fields.table_of(section, "plan", title, made, rows, _notes(frame, peaks))


def _notes(frame: pd.DataFrame, peaks: dict[str, Reading | None]) -> list[str]:
    notes = [
        "Plan: counted without running, one step of the canonical batch. Saved: what autograd keeps for the backward "
        "pass, with torch's math attention. Gradients come as what is saved goes, so the peak is less than the sum."
    ]
    if frame[PEAK].notna().any():
        sources = sorted({peak.source for peak in peaks.values() if peak is not None and peak.value is not None})
        notes.append(
            "Peak, plan: most memory alive in a simulated step with the attention kernel of a GPU, optimiser and cache "
            f"included. Measured: {'; '.join(sources) or 'nothing'}. Ratio: measured over plan."
        )
        if any("RSS" in source or "resident" in source for source in sources):
            notes.append("Resident memory of a CPU run holds batches, buffers of libraries and what malloc keeps, too.")
    if frame["mfu"].notna().any():
        notes.append("MFU: FLOPs of the step over its time, as a share of the device's measured matrix-product rate.")
    return notes


def _measured(shown: tuple[CellResult, ...]) -> Reading | None:
    """The most that training took: torch's allocated peak on a GPU, resident memory over the baseline on a CPU."""
    memories = [(result.training_memory, result.cell.device) for result in shown if result.training_memory]
    readings = [one.host_rss_bytes if device == "cpu" else one.torch_allocated_bytes for one, device in memories]
    return max((one for one in readings if one.value is not None), key=lambda one: one.value or 0.0, default=None)
