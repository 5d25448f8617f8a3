"""What a comparison covered: the first line of its report, which says what was compared, what was not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tpme.bench.quantities import KINDS, Kind
from tpme.reports.gate.verdict import CellVerdict, Comparison, GateReport, Verdict

_NAMES: dict[Kind, str] = {"counter": "counters"}
_SHOWN: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "status")


def scope(report: GateReport) -> str:
    """One line: the kinds of numbers that were compared, those that were not with the reason, and what to change."""
    open_items = [(kind, item) for kind in _SHOWN for item in _leading(report, kind) if item.verdict == "not compared"]
    counts = Counter((kind, item.note or "no reason is known") for kind, item in open_items)
    reasons: dict[tuple[int, str], list[str]] = {}
    for (kind, reason), count in counts.items():
        reasons.setdefault((count, reason), []).append(_name(kind))
    lacking = [f"{join(kinds)} of {_cells(count)} ({reason})" for (count, reason), kinds in reasons.items()]
    for state, words in (("missing", "missing from the runs"), ("new", "not in the baseline")):
        if count := len(report.state(state)):
            lacking.append(f"{_cells(count)} {words}")
    absent = [_name(kind) for kind in _SHOWN if not _leading(report, kind)]
    if absent and len(absent) < len(_SHOWN):
        lacking.append(f"{join(absent)} (on neither side)")
    parts = [f"Compared: {'; '.join(_compared(report)) or 'nothing'}."]
    parts += [f"Not compared: {'; '.join(lacking)}."] if lacking else []
    for advice in dict.fromkeys(item.advice for _, item in open_items if item.advice):
        kinds = dict.fromkeys(_name(kind) for kind, item in open_items if item.advice == advice)
        parts.append(f"To compare {join(list(kinds))}: {advice}.")
    return " ".join(parts)


def kinds_with(report: GateReport, verdict: Verdict) -> list[str]:
    """Names of the kinds whose leading number has that verdict in some cell."""
    return [_name(kind) for kind in _SHOWN if any(item.verdict == verdict for item in _leading(report, kind))]


def kinds_settled(report: GateReport) -> list[str]:
    """Names of the kinds that were compared in every cell that has them, and nowhere left open."""
    unsettled = {*kinds_with(report, "not compared"), *kinds_with(report, "inconclusive")}
    return [_name(kind) for kind in _SHOWN if _leading(report, kind) and _name(kind) not in unsettled]


def join(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _compared(report: GateReport) -> list[str]:
    """What was compared, kinds of equally many cells together."""
    groups: dict[int, list[str]] = {}
    for kind in _SHOWN:
        done = _done(report, kind)
        if done:
            groups.setdefault(len(done), []).append(_name(kind) + _noisy(report, kind, done))
    return [f"{join(names)} of {_cells(count)}" for count, names in groups.items()]


def _noisy(report: GateReport, kind: Kind, done: Sequence[Comparison]) -> str:
    """A remark where the noise of the baseline is larger than the change that counts."""
    usual = {"time": report.policy.time_bound, "memory": report.policy.memory_bound}.get(kind)
    wide = [item.bound for item in done if usual and item.bound and item.bound > usual(item.metric)]
    return f" (only changes above its noise of {max(wide):.0%})" if wide else ""


def _leading(report: GateReport, kind: Kind) -> list[Comparison]:
    cells: list[CellVerdict] = report.state("compared")
    return [item for cell in cells if (item := cell.leading(kind)) is not None]


def _done(report: GateReport, kind: Kind) -> list[Comparison]:
    return [item for item in _leading(report, kind) if item.verdict != "not compared"]


def _name(kind: Kind) -> str:
    return _NAMES.get(kind, kind)


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"
