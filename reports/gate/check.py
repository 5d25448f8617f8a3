"""Compare runs with a baseline: counters exactly, memory tightly, time where a test may speak, quality by users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, Status
from tpme.reports.data.stats import Floats, holm, mann_whitney, paired, smallest_p
from tpme.reports.gate.baseline import Noise, Side
from tpme.reports.gate.gate_metrics import METRICS, gate_metric
from tpme.reports.gate.measures import GateCell, Timing, cell_key, sort_cells
from tpme.reports.gate.verdict import CellVerdict, Comparison, Policy, Verdict, differing, names

TIMES = ("step_s", "epoch_s")
QUALITIES = ("recall_10", "ndcg_10")
BROKEN: frozenset[Status] = frozenset({"error", "killed", "timeout", "skipped"})
"""Ends that say nothing about what a cell costs: where both sides end so, nothing was compared."""


def judge(base: Side, head: Side, policy: Policy) -> list[CellVerdict]:
    """Every cell of either side with all its comparisons.

    Raises UserError where the two sides follow different protocols: they measured different tasks.
    """
    _check_protocols(base, head)
    everything = {one.key: one for one in (*base.cells.values(), *head.cells.values())}
    ordered = sort_cells(everything.values())
    named = dict(zip((one.key for one in ordered), names(one.cell for one in ordered), strict=True))
    quality = _quality(base, head, policy)
    verdicts = []
    for one in ordered:
        old, new = base.cells.get(one.key), head.cells.get(one.key)
        place = partial(CellVerdict, key=one.key, name=named[one.key], dataset=one.cell.dataset)
        if old is not None and new is not None:
            found = (*_cell(old, new, base, head, policy), *quality.get(one.key, ()))
            verdicts.append(place(state="compared", comparisons=found))
        else:
            there = head if new is None else base
            note = _nearest(one.cell, there, base if new is None else head)
            verdicts.append(place(state="missing" if new is None else "new", note=note))
    return verdicts


def _check_protocols(base: Side, head: Side) -> None:
    here, there = ({one.cell.protocol for one in side.cells.values()} for side in (base, head))
    if not here & there:
        raise UserError(
            f"{base.source}: a baseline of the '{'/'.join(sorted(here))}' protocol, but {head.source} ran "
            f"'{'/'.join(sorted(there))}'; they are never compared: give the baseline of that protocol"
        )


def _nearest(cell: Cell, there: Side, here: Side) -> str | None:
    """What sets a cell apart from its nearest namesake that has no partner either."""
    alike = [one.cell for key, one in there.cells.items() if one.cell.label == cell.label and key not in here.cells]
    if not alike:
        return None
    apart = min((differing(cell, other) for other in alike), key=len)
    return f"the nearest cell of the other side differs in {', '.join(apart[:4])}{' ...' if len(apart) > 4 else ''}"


def _cell(old: GateCell, new: GateCell, base: Side, head: Side, policy: Policy) -> Iterator[Comparison]:
    status = _status(old, new)
    yield status
    if status.verdict == "not compared":
        return
    if old.status != "ok" or new.status != "ok":  # what a broken cell never reached is no news
        yield from (one for one in counters(old, new) if one.verdict != "not compared")
        return
    yield from counters(old, new)
    shared = sorted(old.devices.keys() & new.devices.keys())
    if not shared and old.devices and new.devices:
        note = f"measured on {_listed(new.devices)}, the baseline on {_listed(old.devices)}"
        yield Comparison(metric="step_s", kind="time", verdict="not compared", note=note)
        name = next((name for one in new.devices.values() for name in one.memory), "host_rss_bytes")
        yield Comparison(metric=name, kind="memory", verdict="not compared", note=note)
    for device in shared:
        # The base's alone: what makes the head's own runs vary may be the very thing to be noticed.
        noise = base.devices[device].noise if device in base.devices else Noise()
        yield from _times(old.devices[device].timing, new.devices[device].timing, noise, policy)
        yield from _memory(old.devices[device].memory, new.devices[device].memory, noise, policy)


def _listed(devices: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in sorted(devices))


def _status(old: GateCell, new: GateCell) -> Comparison:
    seen = partial(Comparison, metric="status", kind="status", base=old.status, head=new.status)
    if {old.status, new.status} <= BROKEN:
        return seen(verdict="not compared", note=f"it failed on both sides ({old.status}, {new.status})")
    verdict: Verdict = "same"
    if old.status != new.status:
        verdict = "regressed" if old.status == "ok" else "improved" if new.status == "ok" else "changed"
    return seen(verdict=verdict)


def one_sided(name: str, base: float | None, head: float | None) -> Comparison:
    """A number that only one side has: said, not judged."""
    note = "not in the base" if base is None else "not measured by the runs"
    return Comparison(metric=name, kind=gate_metric(name).kind, base=base, head=head, verdict="not compared", note=note)


def counters(old: GateCell, new: GateCell) -> Iterator[Comparison]:
    """Exact counters: any difference is a change. A method's own ones are told, whichever way they moved."""
    highest, trainable = "trainable_parameters_max", "trainable_parameters"
    varied = any(one.counters.get(highest) != one.counters.get(trainable) for one in (old, new))
    for name in METRICS:
        if (name in old.counters or name in new.counters) and (name != highest or varied):
            yield _counter(name, old.counters.get(name), new.counters.get(name), judged=True)
    for name in sorted(old.own_counters.keys() | new.own_counters.keys()):
        yield _counter(name, old.own_counters.get(name), new.own_counters.get(name), judged=False)


def _counter(name: str, old: float | None, new: float | None, *, judged: bool) -> Comparison:
    if old is None or new is None:
        return one_sided(name, old, new)
    verdict: Verdict = "same"
    if old != new:
        verdict = ("regressed" if new > old else "improved") if judged else "changed"
    ratio = new / old if old else None
    return Comparison(metric=name, kind="counter", base=old, head=new, ratio=ratio, bound=0.0, verdict=verdict)


def _times(old: Timing, new: Timing, noise: Noise, policy: Policy) -> Iterator[Comparison]:
    bound = max(policy.time_threshold, noise.time or 0.0)
    for name in TIMES:
        a, b = (np.array(getattr(side, name), dtype=np.float64) for side in (old, new))
        if len(a) and len(b):
            yield time(name, a, b, bound, policy.alpha)
        elif len(a) or len(b):
            yield one_sided(name, *(float(np.median(values)) if len(values) else None for values in (a, b)))


def time(name: str, old: Floats, new: Floats, bound: float, alpha: float) -> Comparison:
    """A change of time needs both: an effect beyond ``bound`` and a rank test that rejects at ``alpha``."""
    medians = float(np.median(old)), float(np.median(new))
    ratio = medians[1] / medians[0]
    p = rank_test(old, new, alpha)
    verdict: Verdict = "not compared" if p is None else direction(ratio, bound) if p < alpha else "same"
    few = f"{len(old)} and {len(new)} values: no test of so few can reject at p < {alpha:g}"
    return Comparison(
        metric=name,
        kind="time",
        base=medians[0],
        head=medians[1],
        ratio=ratio,
        bound=bound,
        p=p,
        verdict=verdict,
        note=few if p is None else None,
    )


def rank_test(old: Floats, new: Floats, alpha: float) -> float | None:
    """p-value of the rank test; ``None`` where so few values could never reject at ``alpha`` (asv's rule)."""
    return mann_whitney(old, new) if smallest_p(len(old), len(new)) < alpha else None


def direction(ratio: float, bound: float) -> Verdict:
    """Of a cost: beyond the bound it regressed; by as much the other way, as a ratio, it improved."""
    if ratio > 1 + bound:
        return "regressed"
    return "improved" if ratio < 1 / (1 + bound) else "same"


def _memory(old: dict[str, float], new: dict[str, float], noise: Noise, policy: Policy) -> Iterator[Comparison]:
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            yield one_sided(name, old.get(name), new.get(name))
            continue
        bound = max(policy.memory_bound(name), noise.memory.get(name, 0.0))
        seen = partial(Comparison, metric=name, kind="memory", base=old[name], head=new[name], bound=bound)
        if old[name] <= 0:
            yield seen(verdict="not compared", note="the baseline holds no positive peak")
            continue
        ratio = new[name] / old[name]
        yield seen(ratio=ratio, verdict=direction(ratio, bound))


# --- quality -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairing:
    """The seeds of one row that both sides ran: gains of each user, averaged over them."""

    key: str
    name: str
    base: Floats
    head: Floats
    bound: float
    seeds: tuple[int, ...]


def _quality(base: Side, head: Side, policy: Policy) -> dict[str, list[Comparison]]:
    """Comparisons of quality by cell key; a row with several seeds is compared once, in its first."""
    rows: dict[str, list[str]] = {}
    for key in base.cells.keys() & head.cells.keys():
        rows.setdefault(cell_key(base.cells[key].cell.model_copy(update={"seed": 0})), []).append(key)
    found: dict[str, list[Comparison]] = {}
    pairings: list[_Pairing] = []
    for keys in rows.values():
        usable = []
        for key in sorted(keys, key=lambda key: base.cells[key].cell.seed):
            reason = _unpaired(base.cells[key], head.cells[key])
            if reason is None:
                usable.append(key)
            elif reason:
                told = Comparison(metric="ndcg_10", kind="quality", verdict="not compared", note=reason)
                found[key] = [told]
        for name in QUALITIES if usable else ():
            pairings.append(_pairing(usable, name, base, head, policy))
    adjusted = holm([paired(one.head - one.base) for one in pairings])
    for one, p in zip(pairings, adjusted, strict=True):
        found.setdefault(one.key, []).append(_judged_quality(one, p, policy))
    return found


def _unpaired(old: GateCell, new: GateCell) -> str | None:
    """Why two cells cannot be paired; empty where there is nothing to tell, ``None`` where they can."""
    if old.status != "ok" or new.status != "ok":
        return ""
    if old.quality is None or new.quality is None:
        return old.no_quality or new.no_quality or ("" if new.quality is None else "no ranks in the baseline")
    if old.quality.users != new.quality.users or len(old.quality.gains("recall_10")) != len(
        new.quality.gains("recall_10")
    ):
        return "the baseline was tested on other users or targets"
    return None


def _pairing(keys: Sequence[str], name: str, base: Side, head: Side, policy: Policy) -> _Pairing:
    old, new = ([side.cells[key].quality.gains(name) for key in keys] for side in (base, head))  # type: ignore[union-attr]
    means = np.array([gains.mean() for gains in old])
    spread = 0.0
    if len(keys) > 1 and means.mean() > 0:
        # Two means over n seeds each differ by less than this in about 19 of 20 cases.
        spread = 2 * np.sqrt(2 / len(keys)) * float(means.std(ddof=1)) / float(means.mean())
    seeds = tuple(base.cells[key].cell.seed for key in keys)
    bound = max(policy.quality_threshold, spread)
    return _Pairing(keys[0], name, np.mean(old, axis=0), np.mean(new, axis=0), bound, seeds)


def _judged_quality(one: _Pairing, p: float, policy: Policy) -> Comparison:
    old, new = float(one.base.mean()), float(one.head.mean())
    verdict: Verdict = "same"
    if p < policy.quality_alpha and abs(new - old) > one.bound * old:
        verdict = "improved" if new > old else "regressed"
    return Comparison(
        metric=one.name,
        kind=gate_metric(one.name).kind,
        base=old,
        head=new,
        ratio=new / old if old else None,
        bound=one.bound,
        p=p,
        verdict=verdict,
        note=f"mean over seeds {', '.join(map(str, one.seeds))}" if len(one.seeds) > 1 else None,
    )
