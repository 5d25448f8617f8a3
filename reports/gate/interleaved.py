"""Judge interleaved runs of two code versions on one device, as ``tpme ab`` makes them.

Noise on a shared machine is one-sided: other load only makes a step slower. All runs of a side take the same steps over
the same batches, so each step counts with its fastest run. The noise of a side is how much slower it would look without
one of its runs. The mean over steps, unlike a quantile, also detects a slowdown of few steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tpme.reports.data.load import Recorded
from tpme.reports.data.stats import Floats, interval, mann_whitney, smallest_p
from tpme.reports.gate.baseline import Side
from tpme.reports.gate.check import direction, judge, one_sided, rank_test, time_verdict
from tpme.reports.gate.measures import finished, measure
from tpme.reports.gate.readings import TIMES, memory
from tpme.reports.gate.verdict import CellVerdict, Comparison, Policy

RESAMPLES = 1000
SUSPICIOUS = 0.5
"""Share of a bound from which a change of time or memory is measured again before it is judged."""
NEAR = 0.75
"""Share of the bound from which a change of memory needs more runs."""
REPEATABLE = ("time", "memory")
"""Kinds of metrics that more runs measure more precisely."""

Runs = Mapping[str, Sequence[Recorded]]
"""The runs of each cell, by its key, in the order in which they ran."""


def judge_runs(
    base: Runs, head: Runs, policy: Policy, names: tuple[str, str], confirmed: Mapping[str, int] | None = None
) -> list[CellVerdict]:
    """Verdicts on every cell of either side: counters, quality and ends as in ``check``, time and memory over the runs.

    Args:
        base: runs of the base.
        head: runs of the head.
        policy: thresholds and levels.
        names: of the two sides.
        confirmed: for cells that were measured again, the number of runs of each side before that; the later runs
            alone must then show a change of time as well.
    """
    sides = [_side(name, runs) for name, runs in zip(names, (base, head), strict=True)]
    verdicts = []
    for cell in judge(sides[0], sides[1], policy):
        if cell.state == "compared":
            first = (confirmed or {}).get(cell.key, 0)
            more = _compare_runs(base[cell.key], head[cell.key], policy, first)
            cell = cell.model_copy(update={"comparisons": (*cell.comparisons, *more)})
        verdicts.append(cell)
    return verdicts


def suspicious(cell: CellVerdict, policy: Policy) -> bool:
    """Whether a cell must be measured again before it is judged.

    True if its end changed, if time or memory moved by half of the bound, and if the noise of its times exceeds the
    threshold.
    """
    for item in cell.comparisons:
        if item.kind == "status" and item.verdict not in ("same", "not compared"):
            return True
        if item.kind not in REPEATABLE or item.ratio is None or item.bound is None:
            continue
        threshold = policy.time_bound(item.metric) if item.kind == "time" else item.bound
        if max(item.ratio, 1 / item.ratio) > 1 + SUSPICIOUS * threshold or item.bound > threshold:
            return True
    return False


def undecided(cell: CellVerdict, policy: Policy) -> bool:
    """Whether more runs are needed: time beyond the threshold but within the noise, or memory near its bound."""
    for item in cell.comparisons:
        if item.kind not in REPEATABLE or item.ratio is None or item.bound is None or item.verdict != "same":
            continue
        threshold = policy.time_bound(item.metric) if item.kind == "time" else NEAR * item.bound
        proven = item.kind == "time" and item.p is not None and item.p < policy.alpha
        withdrawn = proven and direction(item.ratio, item.bound) != "same"  # the later runs did not confirm it
        if direction(item.ratio, threshold) != "same" and not withdrawn:
            return True
    return False


def _side(name: str, runs: Runs) -> Side:
    """Counters, ranks and ends of one side, without its times and peaks."""
    cells = [cell for repeats in runs.values() for cell in measure(_majority(repeats))]
    return Side(name, {cell.key: cell.model_copy(update={"devices": {}}) for cell in cells})


def _majority(runs: Sequence[Recorded]) -> list[Recorded]:
    """The finished runs if they are more than half, else the others."""
    whole = finished(runs)
    return whole if 2 * len(whole) > len(runs) else [run for run in runs if run.result.status != "ok"]


def _compare_runs(base: Sequence[Recorded], head: Sequence[Recorded], policy: Policy, first: int) -> list[Comparison]:
    sides = [finished(runs) for runs in (base, head)]
    if not all(sides):
        return []
    comparisons = []
    for name, times_of in TIMES.items():
        old, new = ([times for recorded in runs if len(times := times_of(recorded))] for runs in sides)
        if old and new:
            item = compare_times(name, old, new, policy)
            comparisons.append(_confirmed(item, old[first:], new[first:], policy) if first else item)
        elif old or new:
            means = (float(_fastest(runs).mean()) if runs else None for runs in (old, new))
            comparisons.append(one_sided(name, *means))
    peaks = [[memory(recorded.result) for recorded in runs] for runs in sides]
    for name in sorted({name for runs in peaks for run in runs for name in run}):
        before, after = ([run[name] for run in runs if name in run] for runs in peaks)
        lowest = min(before, default=None), min(after, default=None)
        both = before and after
        comparisons.append(compare_peaks(name, before, after, policy) if both else one_sided(name, *lowest))
    return comparisons


def compare_times(name: str, base: Sequence[Floats], head: Sequence[Floats], policy: Policy) -> Comparison:
    """Compare the mean over steps of each step's fastest run by threshold, noise and a rank test.

    If there are too few steps (or epochs) for the test to reject, it uses those of all runs.

    Args:
        name: the metric.
        base: its values in every run of the base (seconds), each of shape ``(steps,)``.
        head: its values in every run of the head.
        policy: thresholds and levels.
    """
    best = [_fastest(runs) for runs in (base, head)]
    means = [float(values.mean()) for values in best]
    ratio, bound = means[1] / means[0], max(policy.time_bound(name), _noise(base), _noise(head))
    low, high = _interval(base, head)
    p = rank_test(best[0], best[1], policy.alpha)
    p = rank_test(np.concatenate(base), np.concatenate(head), policy.alpha) if p is None else p
    note = f"fastest of {len(base)} and {len(head)} runs"
    if p is None:
        note = f"too few steps for a test, {note}"
    elif direction(ratio, policy.time_bound(name)) != direction(ratio, bound):
        note = f"within the noise of these runs ({bound:.0%}), {note}"
    verdict = time_verdict(ratio, bound, p, policy.alpha)
    return Comparison.of(name, *means, low=low, high=high, bound=bound, p=p, verdict=verdict, note=note)


def compare_peaks(name: str, base: Sequence[float], head: Sequence[float], policy: Policy) -> Comparison:
    """Compare memory peaks (bytes): their medians differ beyond the bound and the two sides separate.

    They separate if they do not overlap, or if a rank test rejects as clearly as for four runs apart from four.
    """
    if min(base) <= 0:
        return Comparison.of(name, None, None, verdict="not compared", note="the base holds no positive peak")
    medians = float(np.median(base)), float(np.median(head))
    ratio, bound = medians[1] / medians[0], policy.memory_bound(name)
    p = mann_whitney(np.array(base), np.array(head))
    apart = min(head) > max(base) or max(head) < min(base) or p <= smallest_p(4, 4)
    verdict = direction(ratio, bound) if apart else "same"
    low, high = _interval_of_medians(base, head)
    note = f"median of {len(base)} and {len(head)} runs"
    return Comparison.of(name, *medians, low=low, high=high, bound=bound, p=p, verdict=verdict, note=note)


def _confirmed(compared: Comparison, base: Sequence[Floats], head: Sequence[Floats], policy: Policy) -> Comparison:
    """``compared``, or ``same`` if the later runs alone do not show half of the threshold in the same direction."""
    if compared.verdict not in ("regressed", "improved") or not base or not head:
        return compared
    old, new = (float(_fastest(runs).mean()) for runs in (base, head))
    change = new / old if compared.verdict == "regressed" else old / new
    if change > 1 + SUSPICIOUS * policy.time_bound(compared.metric):
        return compared
    return compared.model_copy(
        update={"verdict": "same", "note": f"not confirmed: {new / old - 1:+.1%} when run again"}
    )


def _fastest(runs: Sequence[Floats]) -> Floats:
    """The fastest time of each step, shape ``(steps,)``, over the steps that all runs took."""
    steps = min(map(len, runs))
    fastest: Floats = np.min([times[:steps] for times in runs], axis=0)
    return fastest


def _noise(runs: Sequence[Floats]) -> float:
    """How much slower a side would look without one of its runs, relative; 0 for a single run."""
    if len(runs) < 2:
        return 0.0
    without = [float(_fastest([*runs[:left], *runs[left + 1 :]]).mean()) for left in range(len(runs))]
    return max(0.0, max(without) / float(_fastest(runs).mean()) - 1)


def _interval(base: Sequence[Floats], head: Sequence[Floats]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of ``_fastest``'s means over runs and steps.

    If both sides took equally many steps, the same steps are drawn for both: they worked on the same batches.
    """
    rng = np.random.default_rng(0)
    sides = [np.stack([times[: min(map(len, runs))] for times in runs]) for runs in (base, head)]
    same = sides[0].shape[1] == sides[1].shape[1]
    ratios = []
    for _ in range(RESAMPLES):
        drawn = [rng.integers(side.shape[1], size=side.shape[1]) for side in sides]
        means = [
            float(side[rng.integers(len(side), size=len(side))].min(axis=0)[drawn[0] if same else steps].mean())
            for side, steps in zip(sides, drawn, strict=True)
        ]
        ratios.append(means[1] / means[0])
    return interval(ratios)


def _interval_of_medians(base: Sequence[float], head: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians over runs."""
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(np.array(side), (RESAMPLES, len(side))), axis=1) for side in (base, head)]
    return interval(drawn[1] / drawn[0])
