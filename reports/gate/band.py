"""The band of what counts as equal: a verdict from the interval of a ratio, and what would settle an open one.

With a bound of 10 % the band of head / base reaches from 1 / 1.1 to 1.1. ``same`` is said only where the whole 95 %
interval lies within it, a change only where the whole interval lies outside, and anything else is ``inconclusive``.
"""

from __future__ import annotations

import math

from tpme.bench.quantities import Kind
from tpme.reports.gate.verdict import Comparison, Verdict

MOST_RUNS = 64
"""Most runs of each side that ``tpme ab`` proposes."""
MOST_TIMES_AS_MANY = 10
"""Most values, relative to those there are, that ``tpme check`` proposes."""


def verdict_of(kind: Kind, low: float, high: float, bound: float, *, proven: bool = True) -> Verdict:
    """Verdict on head / base from its 95 % interval.

    Args:
        kind: of the metric; more is worse, except for quality.
        low: lower end of the interval; of a number without an interval, its ratio.
        high: upper end.
        bound: of the band, relative.
        proven: whether the metric's test rejects; without that no change is claimed.
    """
    least, most = 1 / (1 + bound), 1 + bound
    if least <= low and high <= most:
        return "same"
    if not proven or (low <= most and high >= least):
        return "inconclusive"
    worse = (low > most) != (kind == "quality")
    if kind == "time":
        return "slower" if worse else "faster"
    return "regressed" if worse else "improved"


def times_as_many(ratio: float, low: float, high: float, bound: float) -> float:
    """How many times as many values an interval needs to leave the edges of the band.

    Its width shrinks with the square root of their number. Infinite where the ratio lies on an edge.
    """
    centre, edge = math.log(ratio), math.log1p(bound)
    up, down = (max(0.0, width) for width in (math.log(high) - centre, centre - math.log(low)))
    if abs(centre) <= edge:
        gaps = [(up, edge - centre), (down, edge + centre)]
    else:
        gaps = [(down if centre > 0 else up, abs(centre) - edge)]
    return max(1.0, max((width / gap) ** 2 if gap > 0 else math.inf for width, gap in gaps))


def settled_by_runs(item: Comparison, runs: int, most_times: int) -> str:
    """The number of further runs of each side that would settle ``item``, as a sentence.

    Args:
        item: inconclusive, with an interval.
        runs: of each side so far. most_times: how often ``ab`` measures a cell, ``--rounds`` runs each time.
    """
    needed = _needed(item) * runs
    if needed <= MOST_RUNS:
        whole = max(runs + 1, math.ceil(needed))
        more = whole - runs
        rounds = math.ceil(whole / most_times)
        return f"about {more} more run{'s' * (more > 1)} of each side would settle it (--rounds {rounds})"
    return _unsettled(item, f"{MOST_RUNS} runs of each side", "use an idle machine")


def settled_by_values(item: Comparison, values: str, cure: str) -> str:
    """How many times as many ``values`` (steps, users) would settle ``item``, as a sentence; else the ``cure``."""
    needed = _needed(item)
    if needed <= MOST_TIMES_AS_MANY:
        return f"about {max(2, math.ceil(needed))} times as many {values} would settle it"
    return _unsettled(item, f"{MOST_TIMES_AS_MANY} times as many {values}", cure)


def _needed(item: Comparison) -> float:
    if item.ratio is None or item.low is None or item.high is None or not item.bound or item.low <= 0:
        return math.inf
    return times_as_many(item.ratio, item.low, item.high, item.bound)


def _unsettled(item: Comparison, effort: str, cure: str) -> str:
    """Why no reasonable effort settles ``item``: its interval is wide, or it lies at the edge of the band."""
    bound = item.bound or 0.0
    wide = item.low is None or item.high is None or item.low <= 0 or item.high / item.low > (1 + bound) ** 2
    if wide:
        return f"not even {effort} would settle it, they vary too much for a bound of {bound:.0%}: {cure}"
    return f"not even {effort} would settle it: the change is nearly the bound of {bound:.0%}; choose another bound"
