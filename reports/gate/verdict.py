"""What the gate says: a report of comparisons, versioned, the one source of every output format.

``docs/ci.md`` documents the JSON; a change of a field's meaning or name raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tpme.bench.record import Cell, Frozen
from tpme.reports.gate.metrics import KINDS, Kind, metric

SCHEMA_VERSION: Literal[1] = 1
Verdict = Literal["same", "improved", "regressed", "changed", "not compared"]
Overall = Literal["fine", "regressed", "baseline out of date", "nothing compared"]

FINE, REGRESSED, NOTHING_COMPARED, ERROR = 0, 1, 2, 3
"""Exit codes of ``tpme check`` and ``tpme ab``."""


class Policy(Frozen):
    """What counts as a change. Shares are relative: 0.1 is 10 %."""

    time_threshold: float = 0.10
    allocated_bound: float = 0.01
    """Of torch's allocated peak, which hardly varies; reserved memory is never judged."""
    resident_bound: float = 0.05
    """Of a CPU's resident peak, which the C library's allocator and the system share in."""
    quality_threshold: float = 0.05
    alpha: float = 0.002
    """Level of each rank test of times; asv's."""
    quality_alpha: float = 0.01
    """Level of the family of all quality tests of one check."""
    strict: bool = False
    """Any changed or lost exact counter, missing or new cell fails: the baseline must be updated on purpose."""
    require: tuple[Kind, ...] = ()
    """Kinds of which something must have been compared."""

    def memory_bound(self, name: str) -> float:
        """How far a peak may grow."""
        return self.allocated_bound if name == "torch_allocated_bytes" else self.resident_bound


class Comparison(Frozen):
    """One number of one cell, before and after."""

    metric: str
    kind: Kind
    base: float | str | None = None
    head: float | str | None = None
    ratio: float | None = None
    """``head / base``."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the ratio, where there is one."""
    bound: float | None = None
    """The relative change that had to be exceeded."""
    p: float | None = None
    """Of the test, where there is one; of quality after Holm's correction."""
    verdict: Verdict
    note: str | None = None

    @property
    def title(self) -> str:
        """The metric, for people."""
        return metric(self.metric).title


class CellVerdict(Frozen):
    """One cell: in both, only in the baseline (``missing``) or only in the runs (``new``)."""

    key: str
    name: str
    """Unique in the report."""
    dataset: str
    state: Literal["compared", "missing", "new"]
    comparisons: tuple[Comparison, ...] = ()
    note: str | None = None


class GateReport(Frozen):
    """All that ``tpme check`` or ``tpme ab`` found."""

    format: Literal["tpme-gate"] = "tpme-gate"
    schema_version: Literal[1] = SCHEMA_VERSION
    command: Literal["check", "ab"]
    base: str
    """Where the base comes from: a file, or a git revision."""
    head: str
    base_devices: tuple[str, ...] = ()
    head_devices: tuple[str, ...] = ()
    policy: Policy
    overall: Overall
    exit_code: int
    cells: tuple[CellVerdict, ...]
    compared: dict[Kind, int]
    """How many numbers of each kind were compared."""
    notes: tuple[str, ...] = ()
    duration_s: float
    """Time the command itself took."""

    def found(self, *verdicts: Verdict) -> list[tuple[CellVerdict, Comparison]]:
        """All comparisons of these verdicts with their cells, in order."""
        return [(cell, one) for cell in self.cells for one in cell.comparisons if one.verdict in verdicts]

    def state(self, state: str) -> list[CellVerdict]:
        """The cells that are ``compared``, ``missing`` or ``new``."""
        return [cell for cell in self.cells if cell.state == state]


def conclude(cells: Sequence[CellVerdict], policy: Policy, **fields: Any) -> GateReport:
    """The report over judged cells, with its exit code."""
    all_of = [one for cell in cells for one in cell.comparisons]
    compared = {kind: sum(one.kind == kind and one.verdict != "not compared" for one in all_of) for kind in KINDS}
    notes = list(fields.pop("notes", ()))
    lacking = [kind for kind in policy.require if not compared[kind]]
    overall: Overall = "fine"
    if any(one.verdict == "regressed" for one in all_of):
        overall = "regressed"
    elif policy.strict and (
        any(cell.state != "compared" for cell in cells)
        or any(one.kind == "counter" and (one.verdict not in ("same", "not compared") or _lost(one)) for one in all_of)
    ):
        overall = "baseline out of date"
    elif lacking or not any(compared[kind] for kind in KINDS if kind != "status"):
        overall = "nothing compared"
        notes += [f"required, but nothing of it could be compared: {', '.join(lacking)}"] if lacking else []
    exits = {"fine": FINE, "nothing compared": NOTHING_COMPARED}
    return GateReport(
        policy=policy,
        overall=overall,
        exit_code=exits.get(overall, REGRESSED),
        cells=tuple(cells),
        compared=compared,
        notes=tuple(notes),
        **fields,
    )


def _lost(one: Comparison) -> bool:
    """A counter that the runs no longer count; the number of steps is not, where validation stopped the training."""
    return one.base is not None and one.head is None and one.metric != "steps"


def names(cells: Iterable[Cell]) -> list[str]:
    """A name for every cell: its label, followed by whatever sets it apart from others of the same label."""
    listed = list(cells)
    flat = [_flat(cell) for cell in listed]
    found = []
    for cell, own in zip(listed, flat, strict=True):
        same = [other for twin, other in zip(listed, flat, strict=True) if twin.label == cell.label]
        apart = [name for name in own if any(other.get(name) != own[name] for other in same)]
        found.append(cell.label + (f" [{', '.join(f'{name}={own[name]}' for name in apart)}]" if apart else ""))
    return found


def differing(cell: Cell, other: Cell) -> list[str]:
    """The settings in which two cells differ."""
    a, b = _flat(cell), _flat(other)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _flat(cell: Cell) -> dict[str, str]:
    """All settings of a cell that identify it, nested ones by a dotted name."""
    found: dict[str, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else key)
        else:
            found[name] = value if isinstance(value, str) else json.dumps(value)

    walk(cell.model_dump(mode="json", exclude={"device", "lr_trial", "lr_trials"}), "")
    return found
