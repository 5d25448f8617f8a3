"""Judge interleaved runs of two code versions on one device: what ``tpme ab`` measured.

Noise on a shared machine is one-sided: something else can only make a step slower. All runs of a side take the same
steps over the same batches, so the side is represented by each step's fastest run, and how much that would change
without one of the runs says how well it is known. The mean over steps, unlike a quantile, also sees what slows only few
of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tpme.reports.data.load import Recorded
from tpme.reports.data.stats import Floats, mann_whitney, smallest_p
from tpme.reports.gate.baseline import Side
from tpme.reports.gate.check import direction, judge, one_sided, rank_test
from tpme.reports.gate.measures import epoch_times, measure, memory, step_times
from tpme.reports.gate.verdict import CellVerdict, Comparison, Policy, Verdict

RESAMPLES = 1000
LEVEL = 0.95
TIMES = {"step_s": step_times, "epoch_s": epoch_times}
SUSPICIOUS = 0.5
"""Share of a bound from which a change of time or memory is measured again before anything is said about it."""
NEAR = 0.75
"""Share of the bound from which a change of memory is not settled by the runs that are there."""
RUNS_TELL = ("time", "memory")
"""Kinds of numbers of which more runs tell more."""

Runs = Mapping[str, Sequence[Recorded]]
"""The runs of each cell, by its key, in the order in which they ran."""


def judge_runs(
    base: Runs, head: Runs, policy: Policy, names: tuple[str, str], confirmed: Mapping[str, int] | None = None
) -> list[CellVerdict]:
    """Every cell of either side: counters, quality and ends as ``check`` judges them, time and memory over the runs.

    Args:
        base, head: the runs. policy: the rules. names: of the two sides.
        confirmed: of cells that were measured twice, how many of the first runs of each side came before that; the
            later ones alone must then show a change of time as well.
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

    It must where it ended otherwise, where time or memory moved by half of what counts, and where the noise of its
    times is larger than the threshold.
    """
    for one in cell.comparisons:
        if one.kind == "status" and one.verdict not in ("same", "not compared"):
            return True
        if one.kind not in RUNS_TELL or one.ratio is None or one.bound is None:
            continue
        threshold = policy.time_threshold if one.kind == "time" else one.bound
        if max(one.ratio, 1 / one.ratio) > 1 + SUSPICIOUS * threshold or one.bound > threshold:
            return True
    return False


def undecided(cell: CellVerdict, policy: Policy) -> bool:
    """Whether only more runs can tell: time beyond the threshold but not beyond the noise, or memory near its bound."""
    for one in cell.comparisons:
        if one.kind not in RUNS_TELL or one.ratio is None or one.bound is None or one.verdict != "same":
            continue
        threshold = policy.time_threshold if one.kind == "time" else NEAR * one.bound
        proven = one.kind == "time" and one.p is not None and one.p < policy.alpha
        withdrawn = proven and direction(one.ratio, one.bound) != "same"  # more runs have told: it did not come back
        if direction(one.ratio, threshold) != "same" and not withdrawn:
            return True
    return False


def _side(name: str, runs: Runs) -> Side:
    """Counters, ranks and ends; times and peaks are left to this module."""
    cells = [one for recorded in runs.values() for one in measure(_of_the_usual_end(recorded))]
    return Side(name, {one.key: one.model_copy(update={"devices": {}}) for one in cells})


def _of_the_usual_end(runs: Sequence[Recorded]) -> list[Recorded]:
    """The runs that are taken for the cell: those that finished, if more than half of them did, else the others."""
    whole = _whole(runs)
    if 2 * len(whole) > len(runs):
        return whole
    return [recorded for recorded in runs if recorded.result.status != "ok"]


def _whole(runs: Sequence[Recorded]) -> list[Recorded]:
    return [recorded for recorded in runs if recorded.result.status == "ok"]


def _compare_runs(base: Sequence[Recorded], head: Sequence[Recorded], policy: Policy, first: int) -> list[Comparison]:
    sides = [_whole(runs) for runs in (base, head)]
    if not all(sides):
        return []
    found = []
    for name, values_of in TIMES.items():
        old, new = ([taken for recorded in runs if len(taken := values_of(recorded))] for runs in sides)
        if old and new:
            compared = compare_times(name, old, new, policy)
            found.append(_confirmed(compared, old[first:], new[first:], policy) if first else compared)
        elif old or new:
            found.append(one_sided(name, *(float(_fastest(runs).mean()) if runs else None for runs in (old, new))))
    peaks = [[memory(recorded.result) for recorded in runs] for runs in sides]
    for name in sorted({name for runs in peaks for one in runs for name in one}):
        before, after = ([one[name] for one in runs if name in one] for runs in peaks)
        if before and after:
            found.append(compare_peaks(name, before, after, policy))
        else:
            found.append(one_sided(name, min(before, default=None), min(after, default=None)))
    return found


def compare_times(name: str, base: Sequence[Floats], head: Sequence[Floats], policy: Policy) -> Comparison:
    """Mean over steps of each step's fastest run; beyond the threshold, the noise, and what a rank test believes.

    Where there are too few steps (or epochs) for the test to reject, it is given those of all runs.

    Args:
        name: the metric. base, head: its values in every run (seconds), each of shape ``(steps,)``.
    """
    best = [_fastest(runs) for runs in (base, head)]
    means = [float(values.mean()) for values in best]
    ratio, bound = means[1] / means[0], max(policy.time_threshold, _noise(base), _noise(head))
    low, high = _interval(base, head)
    p = rank_test(best[0], best[1], policy.alpha)
    p = rank_test(np.concatenate(base), np.concatenate(head), policy.alpha) if p is None else p
    verdict: Verdict = "not compared" if p is None else direction(ratio, bound) if p < policy.alpha else "same"
    note = f"fastest of {len(base)} and {len(head)} runs"
    if p is None:
        note = f"too few steps for a test, {note}"
    elif direction(ratio, policy.time_threshold) != direction(ratio, bound):
        note = f"within the noise of these runs ({bound:.0%}), {note}"
    return Comparison(
        metric=name,
        kind="time",
        base=means[0],
        head=means[1],
        ratio=ratio,
        low=low,
        high=high,
        bound=bound,
        p=p,
        verdict=verdict,
        note=note,
    )


def compare_peaks(name: str, base: Sequence[float], head: Sequence[float], policy: Policy) -> Comparison:
    """Memory: the median peaks differ beyond the bound, and the peaks of the sides hardly mix (bytes).

    They must not mix at all, or so little that a rank test rejects as it would of four runs apart from four.
    """
    if min(base) <= 0:
        return Comparison(metric=name, kind="memory", verdict="not compared", note="the base holds no positive peak")
    medians = float(np.median(base)), float(np.median(head))
    ratio, bound = medians[1] / medians[0], policy.memory_bound(name)
    p = mann_whitney(np.array(base), np.array(head))
    apart = min(head) > max(base) or max(head) < min(base) or p <= smallest_p(4, 4)
    verdict = direction(ratio, bound) if apart else "same"
    low, high = _interval_of_medians(base, head)
    return Comparison(
        metric=name,
        kind="memory",
        base=medians[0],
        head=medians[1],
        ratio=ratio,
        low=low,
        high=high,
        bound=bound,
        p=p,
        verdict=verdict,
        note=f"median of {len(base)} and {len(head)} runs",
    )


def _confirmed(compared: Comparison, base: Sequence[Floats], head: Sequence[Floats], policy: Policy) -> Comparison:
    """``compared``, unless the later runs alone do not show at least half of what counts, in the same direction."""
    if compared.verdict not in ("regressed", "improved") or not base or not head:
        return compared
    old, new = (float(_fastest(runs).mean()) for runs in (base, head))
    change = new / old if compared.verdict == "regressed" else old / new
    if change > 1 + SUSPICIOUS * policy.time_threshold:
        return compared
    return compared.model_copy(
        update={"verdict": "same", "note": f"not confirmed: {new / old - 1:+.1%} when run again"}
    )


def _fastest(runs: Sequence[Floats]) -> Floats:
    """Each step in the run that took it fastest, shape ``(steps,)``; validation may have stopped a run earlier."""
    steps = min(map(len, runs))
    fastest: Floats = np.min([taken[:steps] for taken in runs], axis=0)
    return fastest


def _noise(runs: Sequence[Floats]) -> float:
    """By how much a side would look slower without one of its runs, relative; 0 for a single run."""
    if len(runs) < 2:
        return 0.0
    without = [float(_fastest([*runs[:left], *runs[left + 1 :]]).mean()) for left in range(len(runs))]
    return max(0.0, max(without) / float(_fastest(runs).mean()) - 1)


def _interval(base: Sequence[Floats], head: Sequence[Floats]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of ``_fastest``'s means: runs and steps are drawn again.

    Where both sides took equally many steps the same ones are drawn, for they worked on the same batches.
    """
    rng = np.random.default_rng(0)
    sides = [np.stack([taken[: min(map(len, runs))] for taken in runs]) for runs in (base, head)]
    same = sides[0].shape[1] == sides[1].shape[1]
    ratios = []
    for _ in range(RESAMPLES):
        drawn = [rng.integers(side.shape[1], size=side.shape[1]) for side in sides]
        means = [
            float(side[rng.integers(len(side), size=len(side))].min(axis=0)[drawn[0] if same else steps].mean())
            for side, steps in zip(sides, drawn, strict=True)
        ]
        ratios.append(means[1] / means[0])
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _interval_of_medians(base: Sequence[float], head: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians over runs."""
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(np.array(side), (RESAMPLES, len(side))), axis=1) for side in (base, head)]
    low, high = np.quantile(drawn[1] / drawn[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
