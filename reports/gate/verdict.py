"""The gate's report: judged comparisons with a schema version, from which every output format is written.

``docs/ci.md`` documents the JSON; a change of a field's meaning or name raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tpme.bench.quantities import KINDS, Kind, quantity
from tpme.bench.record import Cell, Frozen

SCHEMA_VERSION: Literal[2] = 2
Verdict = Literal["same", "faster", "slower", "improved", "regressed", "changed", "inconclusive", "not compared"]
"""Times are faster or slower, everything else has improved or regressed; a change without a direction is ``changed``.

``inconclusive``: compared, and neither ``same`` nor a change is proven. ``not compared``: nothing can be said.
"""
WORSE: tuple[Verdict, ...] = ("slower", "regressed")
BETTER: tuple[Verdict, ...] = ("faster", "improved")
Overall = Literal[
    "fine", "regressed", "baseline out of date", "inconclusive", "requirement not met", "nothing compared"
]

FINE, REGRESSED, UNSETTLED, ERROR = 0, 1, 2, 3
"""Exit codes of ``tpme check`` and ``tpme ab``."""
MOST_NOISE = 5
"""Noise of a baseline above so many times the threshold hides any change of a usual size: 50 % for times."""


class Policy(Frozen):
    """What counts as a change. Shares are relative: 0.1 is 10 %."""

    time_threshold: float = 0.10
    allocated_bound: float = 0.01
    """For torch's allocated peak, which hardly varies; reserved memory is never judged."""
    resident_bound: float = 0.05
    """For the resident peak on a CPU, which the C library's allocator and the system affect."""
    quality_threshold: float = 0.05
    alpha: float = 0.002
    """Level of each rank test of times, as in asv."""
    quality_alpha: float = 0.01
    """Family-wise level of all quality tests of one check."""
    strict: bool = False
    """Fail for any changed or lost exact counter and any missing or new cell: update the baseline explicitly."""
    require: tuple[Kind, ...] = ()
    """Kinds of metrics that must be compared and settled in every cell that has them."""

    def time_bound(self, name: str) -> float:
        """Relative change of a time that counts; passes of inference are short and differ more between processes."""
        return self.time_threshold * (2 if name.startswith("inference") else 1)

    def memory_bound(self, name: str) -> float:
        """Relative growth that a peak may show."""
        if name.endswith("torch_allocated_bytes"):
            return self.allocated_bound
        # What training left in the C library's allocator is part of the resident peak of inference.
        return self.resident_bound * (2 if name.startswith("inference") else 1)


class Comparison(Frozen):
    """One metric of one cell in base and head."""

    metric: str
    kind: Kind
    base: float | str | None = None
    head: float | str | None = None
    ratio: float | None = None
    """``head / base``."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the ratio, if there is one."""
    bound: float | None = None
    """The relative change that still counts as equal."""
    p: float | None = None
    """p-value of the test, if there is one; for quality after Holm's correction."""
    verdict: Verdict
    note: str | None = None
    advice: str | None = None
    """What would settle it where it is inconclusive, or let it be compared where it was not."""

    @classmethod
    def of(cls, metric: str, base: float | str | None, head: float | str | None, **fields: Any) -> Comparison:
        """A comparison with the kind of its metric and, where both sides are numbers, their ratio."""
        numbers = isinstance(base, int | float) and isinstance(head, int | float) and base
        ratio = head / base if numbers else None  # type: ignore[operator]
        kind = quantity(metric).kind or "counter"
        return cls(metric=metric, kind=kind, base=base, head=head, ratio=ratio, **fields)

    @property
    def title(self) -> str:
        """Name of the metric for people."""
        return quantity(self.metric).title

    @property
    def unit(self) -> str:
        """Unit of ``base`` and ``head``, empty for a count or a share."""
        return quantity(self.metric).unit

    @property
    def suspect(self) -> bool:
        """Whether it is inconclusive and looks worse by more than the bound."""
        if self.verdict != "inconclusive" or self.ratio is None or self.bound is None:
            return False
        return self.ratio < 1 / (1 + self.bound) if self.kind == "quality" else self.ratio > 1 + self.bound


class CellVerdict(Frozen):
    """One cell: on both sides, only in the base (``missing``) or only in the head (``new``)."""

    key: str
    name: str
    """Unique in the report."""
    dataset: str
    state: Literal["compared", "missing", "new"]
    comparisons: tuple[Comparison, ...] = ()
    note: str | None = None

    def leading(self, kind: Kind) -> Comparison | None:
        """The comparison that stands for all of a kind: steps for time, the peak of training for memory."""
        return next((item for item in self.comparisons if item.kind == kind), None)


class GateReport(Frozen):
    """The outcome of ``tpme check`` or ``tpme ab``."""

    format: Literal["tpme-gate"] = "tpme-gate"
    schema_version: Literal[2] = SCHEMA_VERSION
    command: Literal["check", "ab"]
    base: str
    """Source of the base: a file or a git revision."""
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

    def with_verdict(self, *verdicts: Verdict) -> list[tuple[CellVerdict, Comparison]]:
        """All comparisons with one of ``verdicts``, with their cells, in order."""
        return [(cell, item) for cell in self.cells for item in cell.comparisons if item.verdict in verdicts]

    def state(self, state: str) -> list[CellVerdict]:
        """The cells that are ``compared``, ``missing`` or ``new``."""
        return [cell for cell in self.cells if cell.state == state]


def conclude(cells: Sequence[CellVerdict], policy: Policy, **fields: Any) -> GateReport:
    """The report over judged cells, with its exit code."""
    comparisons = [item for cell in cells for item in cell.comparisons]
    judged = Counter(item.kind for item in comparisons if item.verdict != "not compared")
    lacking = [kind for kind in policy.require if not _met(kind, cells)]
    notes = list(fields.pop("notes", ()))
    overall: Overall = "fine"
    if any(item.verdict in WORSE for item in comparisons):
        overall = "regressed"
    elif policy.strict and _out_of_date(cells):
        overall = "baseline out of date"
    elif lacking:
        overall = "requirement not met"
        notes.append(f"required, but not settled for every cell that has it: {', '.join(lacking)}")
    elif any(item.suspect for item in comparisons):
        overall = "inconclusive"
    elif not any(judged[kind] for kind in KINDS if kind != "status"):
        overall = "nothing compared"
    return GateReport(
        policy=policy,
        overall=overall,
        exit_code={"fine": FINE, "regressed": REGRESSED, "baseline out of date": REGRESSED}.get(overall, UNSETTLED),
        cells=tuple(cells),
        compared={kind: judged[kind] for kind in KINDS},
        notes=tuple(notes),
        **fields,
    )


def _met(kind: Kind, cells: Sequence[CellVerdict]) -> bool:
    """Whether the leading metric of a kind was settled in every cell that has it, in at least one, and none is lost."""
    leading = [item for cell in cells if (item := cell.leading(kind)) is not None]
    settled = bool(leading) and all(item.verdict not in ("not compared", "inconclusive") for item in leading)
    return settled and not any(cell.state == "missing" for cell in cells)


def _out_of_date(cells: Sequence[CellVerdict]) -> bool:
    """Whether a counter changed or was lost, or one side has further cells."""
    counters = [item for cell in cells for item in cell.comparisons if item.kind == "counter"]
    moved = any(item.verdict not in ("same", "not compared") or _lost(item) for item in counters)
    return moved or any(cell.state != "compared" for cell in cells)


def _lost(item: Comparison) -> bool:
    """Whether the head no longer has a counter. ``steps`` may be missing: early stopping makes it inexact."""
    return item.base is not None and item.head is None and item.metric != "steps"


def names(cells: Iterable[Cell]) -> list[str]:
    """A name for every cell: its label, and the settings in which it differs from cells of the same label."""
    flat = [(cell.label, _flat(cell)) for cell in cells]
    unique = []
    for label, settings in flat:
        namesakes = [other for name, other in flat if name == label]
        apart = [key for key, value in settings.items() if any(other.get(key) != value for other in namesakes)]
        unique.append(label + (f" [{', '.join(f'{key}={settings[key]}' for key in apart)}]" if apart else ""))
    return unique


def differing(cell: Cell, other: Cell) -> list[str]:
    """The settings in which two cells differ."""
    a, b = _flat(cell), _flat(other)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _flat(cell: Cell) -> dict[str, str]:
    """All settings that identify a cell; nested ones have dotted names."""
    flat: dict[str, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else key)
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)

    walk(cell.model_dump(mode="json", exclude={"device", "lr_trial", "lr_trials"}), "")
    return flat
