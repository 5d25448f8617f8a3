"""A record that is valid and says little: what tests of records change one thing of."""

from __future__ import annotations

from typing import Any

from tpme.bench.record import Cell, CellResult, Reading, cell_id

CELL = Cell(method="lora", dataset="d", dataset_fingerprint="f", modalities=("text",))


def result(**changes: Any) -> CellResult:
    """The record with these fields changed; its id is that of its cell unless it is among them."""
    plain: dict[str, Any] = {
        "cell_id": cell_id(changes.get("cell", CELL), "v"),
        "attempt": 1,
        "cell": CELL,
        "code_version": "v",
        "status": "ok",
        "started_at": "2026-01-01T00:00:00+00:00",
        "wall_s": 1.5,
        "epoch_time_s": Reading(value=0.5, source="clock"),
    }
    return CellResult(**(plain | changes))
