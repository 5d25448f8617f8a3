"""Plan against measured: what a cell must hold and compute by its counters, beside the peak that was measured."""

from __future__ import annotations

import pandas as pd

from tpme.bench.record import CellResult, Reading
from tpme.reports import fields
from tpme.reports.fields import Field, byte_unit
from tpme.reports.load import counter_values
from tpme.reports.section import Section
from tpme.reports.table import MISSING, Column, Entry, Table, number
from tpme.reports.trials import Line

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
    known = {name: {key: _counter(shown, key) for key in names} for name, shown in section.behind.items()}
    rows = [str(name) for name in section.summary.index if known[str(name)]["weight_bytes"] is not None]
    peaks = {name: _measured(section.behind[name]) for name in rows}
    frame = pd.DataFrame({name: known[name] for name in rows}).T.astype(float)
    if frame.empty:
        return fields.table_of(section, "plan", "Plan against measured", [fields.method(section)], ())
    frame["measured_peak_bytes"] = pd.Series({name: peak and peak.value for name, peak in peaks.items()}, dtype=float)
    frame["flops"] = frame["forward_flops"] + frame["backward_flops"]
    unit, scale = byte_unit(frame[[*PARTS, "measured_peak_bytes"]].max())
    made = [fields.method(section)]
    made += [_of(frame, key, f"{header} ({unit})", scale) for key, header in PARTS.items()]
    if frame[PEAK].notna().any():
        frame["peak_ratio"] = frame["measured_peak_bytes"] / frame[PEAK]
        made += [
            _of(frame, PEAK, f"Peak, plan ({unit})", scale),
            _of(frame, "measured_peak_bytes", f"measured ({unit})", scale),
            _of(frame, "peak_ratio", "Ratio"),
        ]
    flop, per = ("TFLOP", 1e12) if frame["flops"].max() >= 1e12 else ("GFLOP", 1e9)
    made.append(_of(frame, "flops", f"{flop}/step", per))
    if frame["mfu"].notna().any():
        frame["mfu_percent"] = 100 * frame["mfu"]
        made.append(_of(frame, "mfu_percent", "MFU (%)"))
    title = "Plan against measured" if "peak_ratio" in frame else "What a training step needs, by its counters"
    return fields.table_of(section, "plan", title, made, rows, _notes(frame, peaks))


def _notes(frame: pd.DataFrame, peaks: dict[str, Reading | None]) -> list[str]:
    notes = [
        "Plan: counted without running, one step of the canonical batch. Saved: what autograd keeps for the backward "
        "pass, with torch's math attention. Gradients come as what is saved goes, so the peak is less than the sum."
    ]
    if "peak_ratio" in frame:
        sources = sorted({peak.source for peak in peaks.values() if peak is not None and peak.value is not None})
        notes.append(
            "Peak, plan: most memory alive in a simulated step with the attention kernel of a GPU, optimiser and cache "
            f"included. Measured: {'; '.join(sources) or 'nothing'}. Ratio: measured over plan."
        )
        if any("RSS" in source or "resident" in source for source in sources):
            notes.append("Resident memory of a CPU run holds batches, buffers of libraries and what malloc keeps, too.")
    if "mfu_percent" in frame:
        notes.append("MFU: FLOPs of the step over its time, as a share of the device's measured matrix-product rate.")
    return notes


def _of(frame: pd.DataFrame, key: str, header: str, scale: float = 1) -> Field:
    def entry(name: str, line: Line) -> Entry:
        value = float(frame[key][name])
        return Entry(MISSING) if pd.isna(value) else Entry(number(value / scale), value)

    return Column(key, header), entry


def _counter(shown: tuple[CellResult, ...], name: str) -> float | None:
    """Mean over the seeds; the exact ones are the same in all."""
    values = counter_values(shown, name)
    return sum(values) / len(values) if values else None


def _measured(shown: tuple[CellResult, ...]) -> Reading | None:
    """The most that training took: torch's allocated peak on a GPU, resident memory over the baseline on a CPU."""
    memories = [(result.training_memory, result.cell.device) for result in shown if result.training_memory]
    readings = [one.host_rss_bytes if device == "cpu" else one.torch_allocated_bytes for one, device in memories]
    return max((one for one in readings if one.value is not None), key=lambda one: one.value or 0.0, default=None)
