"""Judge interleaved runs of two code versions on one device, as ``tpme ab`` makes them.

Noise on a shared machine is one-sided: other load only makes a step slower. All runs of a side take the same steps over
the same batches, so each step counts with its fastest run. The mean over steps, unlike a quantile, also detects a
slowdown of few steps. Runs and steps are resampled for the interval of the ratio, and the verdict follows from where it
lies: see ``band``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from tpme.reports.data.load import Recorded
from tpme.reports.data.stats import Floats, interval, mann_whitney, smallest_p
from tpme.reports.gate.band import settled_by_runs, verdict_of
from tpme.reports.gate.baseline import Side
from tpme.reports.gate.check import judge, one_sided, rank_test
from tpme.reports.gate.measures import finished, measure
from tpme.reports.gate.readings import TIMES, memory
from tpme.reports.gate.verdict import BETTER, WORSE, CellVerdict, Comparison, Policy

RESAMPLES = 1000
SUSPICIOUS = 0.5
"""Share of a bound from which a change of time or memory is measured again before it is judged."""
MOST_TIMES = 4
"""Most measurements of a cell: two where it looks changed, more where its interval does not tell."""
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


def suspicious(cell: CellVerdict) -> bool:
    """Whether a cell must be measured again before it is judged.

    True if its end changed, if time or memory moved by half of the bound, and where more runs may settle a number.
    """
    for item in cell.comparisons:
        if item.kind == "status" and item.verdict not in ("same", "not compared"):
            return True
        if item.kind not in REPEATABLE or item.ratio is None or item.bound is None:
            continue
        if max(item.ratio, 1 / item.ratio) > 1 + SUSPICIOUS * item.bound:
            return True
    return undecided(cell)


def undecided(cell: CellVerdict) -> bool:
    """Whether more runs may settle a number."""
    return any(item.kind in REPEATABLE and item.verdict == "inconclusive" for item in cell.comparisons)


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
    for name in dict.fromkeys(name for runs in peaks for run in runs for name in run):  # training before inference
        before, after = ([run[name] for run in runs if name in run] for runs in peaks)
        lowest = min(before, default=None), min(after, default=None)
        both = before and after
        comparisons.append(compare_peaks(name, before, after, policy) if both else one_sided(name, *lowest))
    return comparisons


def compare_times(name: str, base: Sequence[Floats], head: Sequence[Floats], policy: Policy) -> Comparison:
    """Compare the mean over steps of each step's fastest run by the interval of the ratio and a rank test.

    If there are too few steps (or epochs) for the test to reject, it uses those of all runs.

    Args:
        name: the metric.
        base: its values in every run of the base (seconds), each of shape ``(steps,)``.
        head: its values in every run of the head.
        policy: thresholds and levels.
    """
    best = [_fastest(runs) for runs in (base, head)]
    means = [float(values.mean()) for values in best]
    bound, (low, high) = policy.time_bound(name), _interval(base, head)
    p = rank_test(best[0], best[1], policy.alpha)
    p = rank_test(np.concatenate(base), np.concatenate(head), policy.alpha) if p is None else p
    compared = partial(Comparison.of, name, *means, low=low, high=high, bound=bound, p=p)
    note = f"{len(base)} and {len(head)} runs"
    if p is None:
        return compared(verdict="not compared", note=f"too few steps for a test, {note}", advice="run more steps")
    verdict = verdict_of("time", low, high, bound, proven=p < policy.alpha)
    return _settled(compared(verdict=verdict, note=note), base, head)


def _settled(compared: Comparison, base: Sequence[object], head: Sequence[object]) -> Comparison:
    """``compared``; ``inconclusive`` where a single run shows no noise, and with the runs that would settle that."""
    runs = min(len(base), len(head))
    if runs > 1 and compared.verdict != "inconclusive":
        return compared
    advice = settled_by_runs(compared, runs, MOST_TIMES)
    return compared.model_copy(update={"verdict": "inconclusive", "advice": advice})


def compare_peaks(name: str, base: Sequence[float], head: Sequence[float], policy: Policy) -> Comparison:
    """Compare memory peaks (bytes): the interval of their medians' ratio leaves the band and the two sides separate.

    They separate if they do not overlap, or if a rank test rejects as clearly as for four runs apart from four.
    """
    if min(base) <= 0:
        return Comparison.of(name, None, None, verdict="not compared", note="the base holds no positive peak")
    medians = float(np.median(base)), float(np.median(head))
    p = mann_whitney(np.array(base), np.array(head))
    apart = min(head) > max(base) or max(head) < min(base) or p <= smallest_p(4, 4)
    bound, (low, high) = policy.memory_bound(name), _interval_of_medians(base, head)
    verdict = verdict_of("memory", low, high, bound, proven=apart)
    note = f"{len(base)} and {len(head)} runs"
    compared = Comparison.of(name, *medians, low=low, high=high, bound=bound, p=p, verdict=verdict, note=note)
    return _settled(compared, base, head)


def _confirmed(compared: Comparison, base: Sequence[Floats], head: Sequence[Floats], policy: Policy) -> Comparison:
    """``compared``; ``inconclusive`` if the later runs alone do not show half of the threshold in its direction."""
    if compared.verdict not in (*WORSE, *BETTER) or not base or not head:
        return compared
    old, new = (float(_fastest(runs).mean()) for runs in (base, head))
    change = new / old if compared.verdict in WORSE else old / new
    if change > 1 + SUSPICIOUS * policy.time_bound(compared.metric):
        return compared
    note = f"not confirmed: {new / old - 1:+.1%} when run again"
    advice = "something else slowed the machine for a while: compare again when it is idle"
    return compared.model_copy(update={"verdict": "inconclusive", "note": note, "advice": advice})


def _fastest(runs: Sequence[Floats]) -> Floats:
    """The fastest time of each step, shape ``(steps,)``, over the steps that all runs took."""
    steps = min(map(len, runs))
    fastest: Floats = np.min([times[:steps] for times in runs], axis=0)
    return fastest


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
