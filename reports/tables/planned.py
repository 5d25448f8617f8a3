"""Planned against measured: memory and FLOPs of a cell by its counters, beside the measured peak."""

from __future__ import annotations

from functools import partial

import pandas as pd

from tpme.bench.quantities import byte_unit, memory_reading, quantity
from tpme.bench.record import CellResult, Reading
from tpme.reports.data.section import Section
from tpme.reports.tables import fields
from tpme.reports.tables.table import Table

PARTS = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "saved_bytes")
"""Counters of memory, in the order in which a step needs it."""
PEAK, MEASURED = "planned_peak_bytes", "measured_peak_bytes"


def planned(section: Section) -> Table:
    """Memory by its parts, planned and measured peak, FLOPs of a step; rows whose counters are known."""
    frame = section.counters((*PARTS, PEAK, "forward_flops", "backward_flops", "mfu"))
    frame = frame[frame["weight_bytes"].notna()].drop(columns=[f"{key}_sd" for key in (*PARTS, PEAK)])  # all the same
    peaks = {name: _measured(section.behind[name]) for name in frame.index}
    frame[MEASURED] = pd.Series({name: peak and peak.value for name, peak in peaks.items()}, dtype=float)
    frame["flops"] = frame["forward_flops"] + frame["backward_flops"]
    frame["peak_ratio"] = frame[MEASURED] / frame[PEAK]
    frame["mfu_percent"], frame["mfu_percent_sd"] = 100 * frame["mfu"], 100 * frame["mfu_sd"]
    unit = byte_unit(frame[[*PARTS, MEASURED]].max())
    flop, size = quantity("flops").scale(frame["flops"])
    cost = partial(fields.cost, section, frame=frame)
    columns = [fields.method(section), *(field for key in PARTS for field in cost(key, unit=unit))]
    if frame[PEAK].notna().any():
        columns += [*cost(PEAK, unit=unit), *cost(MEASURED, unit=unit), *cost("peak_ratio")]
    columns += cost("flops", header=f"{flop}/step", unit=(flop, size))
    if frame["mfu"].notna().any():
        columns += cost("mfu_percent")
    title = "Plan against measured" if frame[PEAK].notna().any() else "What a training step needs, by its counters"
    return fields.table_of(section, "plan", title, columns, frame.index, _notes(frame, peaks))


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


def _measured(results: tuple[CellResult, ...]) -> Reading | None:
    """The largest training peak of the seeds that can be compared with a plan."""
    readings = [memory_reading("measured_peak_bytes", result.pass_memory, result.cell.device) for result in results]
    return max((peak for peak in readings if peak.value is not None), key=lambda peak: peak.value or 0.0, default=None)
