"""Compare runs with a baseline: counters exactly, memory by bounds, time and quality by an interval and a test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from tpme.bench.errors import UserError
from tpme.bench.quantities import NAMED, QUANTITIES, Kind
from tpme.bench.record import Cell, Status
from tpme.reports.data.stats import (
    Floats,
    holm,
    mann_whitney,
    median_ratio_interval,
    paired,
    paired_ratio_interval,
    smallest_p,
)
from tpme.reports.data.trials import OTHER_TASKS
from tpme.reports.gate.band import settled_by_values, verdict_of
from tpme.reports.gate.baseline import Noise, Side, load_baseline, load_runs
from tpme.reports.gate.measures import GateCell, Timing, cell_key, sort_cells
from tpme.reports.gate.readings import TIMES
from tpme.reports.gate.verdict import (
    MOST_NOISE,
    CellVerdict,
    Comparison,
    GateReport,
    Policy,
    Verdict,
    conclude,
    differing,
    names,
)

QUALITIES = ("recall_10", "ndcg_10")
BROKEN: frozenset[Status] = frozenset({"error", "killed", "timeout", "skipped"})
"""Ends that say nothing about a cell's cost: if both sides end in one of them, nothing is compared."""
MEASURE_HERE = "measure the baseline on this device ('tpme baseline RUNS --out FILE --update')"
MEASURE_AGAIN = "repeat the runs of the baseline on an idle machine, three times or more"
RUN, ALONE = "run it on this device", "repeat the runs on an idle machine"
AB = {
    MEASURE_HERE: f"{MEASURE_HERE}, or use 'tpme ab'",
    MEASURE_AGAIN: f"{MEASURE_AGAIN}, or use 'tpme ab'",
    ALONE: "compare with 'tpme ab' on an idle machine",
    RUN: "run the matrix",
}
"""What else helps where ``tpme run`` measures the cells: ``tpme ab`` runs a matrix."""
VALUES = {"step_s": "steps", "epoch_s": "epochs"}
"""What there are many of, by time; passes of inference otherwise."""


def check_runs(runs: Sequence[Path], baseline: Path, policy: Policy) -> GateReport:
    """The report of ``tpme check``: runs against a baseline file, or a run folder used as one.

    Raises UserError for what cannot be read, and for sides of different protocols.
    """
    started = perf_counter()
    base, head = load_baseline(baseline), load_runs(runs)
    return conclude(
        judge(base, head, policy),
        policy,
        command="check",
        base=base.source,
        head=head.source,
        base_devices=tuple(base.devices),
        head_devices=tuple(head.devices),
        notes=(*base.notes, *head.notes, *_other_packages(base, head)),
        duration_s=perf_counter() - started,
    )


def _other_packages(base: Side, head: Side) -> tuple[str, ...]:
    both = sorted(base.packages.keys() & head.packages.keys())
    other = [name for name in both if base.packages[name] != head.packages[name]]
    changes = ", ".join(f"{name} {base.packages[name]} -> {head.packages[name]}" for name in other)
    return (f"package versions differ from the base: {changes}",) if changes else ()


def judge(base: Side, head: Side, policy: Policy) -> list[CellVerdict]:
    """Every cell of either side with its comparisons.

    Raises UserError if the two sides follow different protocols, which are different tasks.
    """
    _check_protocols(base, head)
    ordered = sort_cells((base.cells | head.cells).values())
    quality = _quality(base, head, policy)
    verdicts = []
    for item, name in zip(ordered, names(item.cell for item in ordered), strict=True):
        old, new = base.cells.get(item.key), head.cells.get(item.key)
        verdict = partial(CellVerdict, key=item.key, name=name, dataset=item.cell.dataset)
        if old is not None and new is not None:
            judged = _cell(old, new, base, head, policy)
            if item.cell.task == OTHER_TASKS["task"]:
                judged = map(_with_ab, judged)
            comparisons = (*judged, *quality.get(item.key, ()))
            verdicts.append(verdict(state="compared", comparisons=comparisons))
        else:
            there, here = (head, base) if new is None else (base, head)
            note = _nearest(item.cell, there, here)
            verdicts.append(verdict(state="missing" if new is None else "new", note=note))
    return verdicts


def _with_ab(item: Comparison) -> Comparison:
    """``item`` with advice that holds of a matrix alone."""
    advice = item.advice
    for plain, more in AB.items():
        advice = advice.replace(plain, more) if advice else advice
    return item.model_copy(update={"advice": advice})


def _check_protocols(base: Side, head: Side) -> None:
    here, there = ({item.cell.protocol for item in side.cells.values()} for side in (base, head))
    if not here & there:
        raise UserError(
            f"{base.source}: a baseline of the '{'/'.join(sorted(here))}' protocol, but {head.source} ran "
            f"'{'/'.join(sorted(there))}'; protocols are never compared: give a baseline of the same protocol"
        )


def _nearest(cell: Cell, there: Side, here: Side) -> str | None:
    """The settings in which a cell differs from the nearest unmatched cell of the same label on the other side."""
    alike = [item.cell for key, item in there.cells.items() if item.cell.label == cell.label and key not in here.cells]
    if not alike:
        return None
    apart = min((differing(cell, other) for other in alike), key=len)
    return f"the nearest cell of the other side differs in {', '.join(apart[:4])}{' ...' if len(apart) > 4 else ''}"


def _cell(old: GateCell, new: GateCell, base: Side, head: Side, policy: Policy) -> Iterator[Comparison]:
    status = _status(old, new)
    yield status
    if status.verdict == "not compared":
        return
    if old.status != "ok" or new.status != "ok":  # a broken cell lacks the counters it never reached
        yield from (item for item in counters(old, new) if item.verdict != "not compared")
        return
    yield from counters(old, new)
    shared = sorted(old.devices.keys() & new.devices.keys())
    if not shared:
        yield from _elsewhere(old, new)
    for device in shared:
        # The noise of the base alone: variation of the head's runs may be the regression.
        noise = base.devices[device].noise if device in base.devices else Noise()
        yield from _times(old.devices[device].timing, new.devices[device].timing, noise, policy)
        yield from _memory(old.devices[device].memory, new.devices[device].memory, noise, policy)


def _elsewhere(old: GateCell, new: GateCell) -> Iterator[Comparison]:
    """Time and memory of a cell that the two sides did not measure on one device."""
    if old.devices and new.devices:
        note, advice = f"measured on {_listed(new.devices)}, the baseline on {_listed(old.devices)}", MEASURE_HERE
    else:
        note = "not measured by the runs" if old.devices else "the baseline was counted, not measured"
        advice = RUN if old.devices else MEASURE_HERE
    measured = list((new.devices or old.devices).values())
    times = (name for name in TIMES if any(getattr(one.timing, name) for one in measured))
    peaks = (name for one in measured for name in one.memory)
    for name in (next(times, None), next(peaks, None)):
        if name is not None:
            yield Comparison.of(name, None, None, verdict="not compared", note=note, advice=advice)


def _listed(devices: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in sorted(devices))


def _status(old: GateCell, new: GateCell) -> Comparison:
    comparison = partial(Comparison.of, "status", old.status, new.status)
    if {old.status, new.status} <= BROKEN:
        return comparison(verdict="not compared", note=f"it failed on both sides ({old.status}, {new.status})")
    verdict: Verdict = "same"
    if old.status != new.status:
        verdict = "regressed" if old.status == "ok" else "improved" if new.status == "ok" else "changed"
    return comparison(verdict=verdict)


def one_sided(name: str, base: float | None, head: float | None) -> Comparison:
    """A number that only one side has: reported, not judged."""
    note = "not in the base" if base is None else "not measured by the runs"
    return Comparison.of(name, base, head, verdict="not compared", note=note)


def counters(old: GateCell, new: GateCell) -> Iterator[Comparison]:
    """Exact counters: any difference is a change. A method's own counters are reported but never judged."""
    highest, trainable = "trainable_parameters_max", "trainable_parameters"
    varied = any(side.counters.get(highest) != side.counters.get(trainable) for side in (old, new))
    for name in QUANTITIES:
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
    return Comparison.of(name, old, new, bound=0.0, verdict=verdict)


def _times(old: Timing, new: Timing, noise: Noise, policy: Policy) -> Iterator[Comparison]:
    most = MOST_NOISE * policy.time_threshold
    for name in TIMES:
        a, b = (np.array(getattr(side, name), dtype=np.float64) for side in (old, new))
        if len(a) and len(b):
            bound = max(policy.time_bound(name), noise.time or 0.0, _spread(a) if name.startswith("inference") else 0.0)
            yield _hidden(time(name, a, b, bound, policy.alpha), noise.time, most)
        elif len(a) or len(b):
            yield one_sided(name, *(float(np.median(values)) if len(values) else None for values in (a, b)))


def _spread(times: Floats) -> float:
    """Distance of the quartiles over the median. Passes of inference are short, and the noise is that of steps."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float((high - low) / median)


def time(name: str, old: Floats, new: Floats, bound: float, alpha: float) -> Comparison:
    """Compare medians by the interval of their ratio; a change also needs a rank test that rejects at ``alpha``."""
    medians = float(np.median(old)), float(np.median(new))
    p = rank_test(old, new, alpha)
    if p is None:
        note = f"{len(old)} and {len(new)} values: no test of so few can reject at p < {alpha:g}"
        advice = "run more steps, or repeat the runs"
        return Comparison.of(name, *medians, bound=bound, verdict="not compared", note=note, advice=advice)
    low, high = median_ratio_interval(old, new)
    verdict = verdict_of("time", low, high, bound, proven=p < alpha)
    item = Comparison.of(name, *medians, low=low, high=high, bound=bound, p=p, verdict=verdict)
    return _advised(item, VALUES.get(name, "passes"), ALONE)


def _advised(item: Comparison, values: str, cure: str) -> Comparison:
    """``item`` and, where it is inconclusive, how many times as many ``values`` would settle it, or a ``cure``."""
    if item.verdict != "inconclusive":
        return item
    return item.model_copy(update={"advice": settled_by_values(item, values, cure)})


def _hidden(item: Comparison, noise: float | None, most: float) -> Comparison:
    """``item``, or ``not compared`` where it claims no change and noise above ``most`` would hide any usual one."""
    if noise is None or noise <= most or item.verdict not in ("same", "inconclusive"):
        return item
    note = f"the baseline's noise of {noise:.0%} hides anything smaller"
    return item.model_copy(update={"verdict": "not compared", "note": note, "advice": MEASURE_AGAIN})


def rank_test(old: Floats, new: Floats, alpha: float) -> float | None:
    """p-value of the rank test; ``None`` if so few values can never reject at ``alpha`` (asv's rule)."""
    return mann_whitney(old, new) if smallest_p(len(old), len(new)) < alpha else None


def _memory(old: dict[str, float], new: dict[str, float], noise: Noise, policy: Policy) -> Iterator[Comparison]:
    for name in dict.fromkeys([*old, *new]):  # training before inference
        if name not in old or name not in new:
            yield one_sided(name, old.get(name), new.get(name))
            continue
        usual, varied = policy.memory_bound(name), noise.memory.get(name)
        bound = max(usual, varied or 0.0)
        comparison = partial(Comparison.of, name, old[name], new[name], bound=bound)
        if old[name] <= 0:
            yield comparison(verdict="not compared", note="the baseline holds no positive peak")
        else:
            ratio = new[name] / old[name]
            yield _hidden(comparison(verdict=verdict_of("memory", ratio, ratio, bound)), varied, MOST_NOISE * usual)


# --- quality -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairing:
    """Gains of each user, averaged over the seeds of one row that both sides ran."""

    key: str
    name: str
    base: Floats
    head: Floats
    bound: float
    seeds: tuple[int, ...]


def _quality(base: Side, head: Side, policy: Policy) -> dict[str, list[Comparison]]:
    """Comparisons of quality by cell key; a row with several seeds is compared once, under its first."""
    rows: dict[str, list[str]] = {}
    for key in base.cells.keys() & head.cells.keys():
        rows.setdefault(cell_key(base.cells[key].cell.model_copy(update={"seed": 0})), []).append(key)
    comparisons: dict[str, list[Comparison]] = {}
    pairings: list[_Pairing] = []
    for keys in rows.values():
        usable = []
        for key in sorted(keys, key=lambda key: base.cells[key].cell.seed):
            reason = _unpaired(base.cells[key], head.cells[key])
            if reason is None:
                usable.append(key)
            elif reason:
                comparisons[key] = [Comparison.of("ndcg_10", None, None, verdict="not compared", note=reason)]
        for name in QUALITIES if usable else ():
            pairings.append(_pairing(usable, name, base, head, policy))
        if named := list(_named(keys, base, head, policy)):
            comparisons[keys[0]] = named
    adjusted = holm([paired(pairing.head - pairing.base) for pairing in pairings])
    for pairing, p in zip(pairings, adjusted, strict=True):
        comparisons.setdefault(pairing.key, []).append(_judged_quality(pairing, p, policy))
    return comparisons


def _unpaired(old: GateCell, new: GateCell) -> str | None:
    """Why two cells cannot be paired: ``None`` if they can, empty if that needs no note."""
    if old.status != "ok" or new.status != "ok":
        return ""
    if old.metrics or new.metrics:
        return ""
    if old.quality is None or new.quality is None:
        return old.no_quality or new.no_quality or ("" if new.quality is None else "no ranks in the baseline")
    users = [len(quality.gains("recall_10")) for quality in (old.quality, new.quality)]
    if old.quality.users != new.quality.users or users[0] != users[1]:
        return "the baseline was tested on other users or targets"
    return None


def _named(keys: Sequence[str], base: Side, head: Side, policy: Policy) -> Iterator[Comparison]:
    """The named metrics of a row, mean over the seeds that finished on both sides.

    There are no users to test over: a change counts beyond the threshold and what means over these seeds differ by.
    """
    cells = [(base.cells[key], head.cells[key]) for key in keys]
    pairs = [(old.metrics or {}, new.metrics or {}) for old, new in cells if old.status == new.status == "ok"]
    for name in dict.fromkeys(name for sides in pairs for side in sides for name in side):
        both = [(old[name], new[name]) for old, new in pairs if name in old and name in new]
        key = f"{NAMED}{name}"
        if not both:
            yield Comparison.of(key, None, None, verdict="not compared", note=f"{name} is on one side alone")
            continue
        values = [np.array([np.mean(one.values) for one in side]) for side in zip(*both, strict=True)]
        old, new = (float(side.mean()) for side in values)
        bound = max(policy.quality_threshold, _seed_spread(values[0]))
        note = f"mean over {len(both)} seeds" if len(both) > 1 else "one seed: no test, the threshold alone"
        comparison = partial(Comparison.of, key, old, new, bound=bound, note=note)
        if old == new:
            yield comparison(verdict="same")
        elif old <= 0 or new <= 0:
            yield comparison(verdict="not compared", note=f"no ratio of {old:g} and {new:g}")
        else:
            kind: Kind = "quality" if both[0][0].higher_is_better else "memory"  # of which more is worse
            yield comparison(verdict=verdict_of(kind, new / old, new / old, bound))


def _seed_spread(means: Floats) -> float:
    """Two means over n seeds each differ by less than this share in about 95 % of cases; 0 for one seed."""
    if len(means) < 2 or not means.mean() > 0:
        return 0.0
    return 2 * float(np.sqrt(2 / len(means))) * float(means.std(ddof=1)) / float(means.mean())


def _pairing(keys: Sequence[str], name: str, base: Side, head: Side, policy: Policy) -> _Pairing:
    old, new = ([side.cells[key].quality.gains(name) for key in keys] for side in (base, head))  # type: ignore[union-attr]
    means = np.array([gains.mean() for gains in old])
    spread = _seed_spread(means)
    seeds = tuple(base.cells[key].cell.seed for key in keys)
    bound = max(policy.quality_threshold, spread)
    return _Pairing(keys[0], name, np.mean(old, axis=0), np.mean(new, axis=0), bound, seeds)


def _judged_quality(pairing: _Pairing, p: float, policy: Policy) -> Comparison:
    old, new = float(pairing.base.mean()), float(pairing.head.mean())
    interval, proven = paired_ratio_interval(pairing.base, pairing.head), p < policy.quality_alpha
    note = f"mean over seeds {', '.join(map(str, pairing.seeds))}" if len(pairing.seeds) > 1 else None
    comparison = partial(Comparison.of, pairing.name, old, new, bound=pairing.bound, p=p, note=note)
    if interval is None:  # one side hits nothing
        moved: Verdict = "improved" if new > old else "regressed"
        return comparison(verdict="same" if old == new else moved if proven else "inconclusive")
    low, high = interval
    verdict = verdict_of("quality", low, high, pairing.bound, proven=proven)
    return _advised(comparison(low=low, high=high, verdict=verdict), "users", "add seeds to the matrix")
