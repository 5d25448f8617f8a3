"""Statistical tests in numpy alone: Mann-Whitney, a paired randomisation test, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
"""Level of all intervals."""
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
EXACT_RANKS = 40
"""Mann-Whitney counts all arrangements up to this many values together, beyond it uses the normal approximation."""
EXACT_SIGNS = 16
"""The paired test counts all sign patterns up to this many differing pairs (65,536 patterns)."""


def mann_whitney(a: Floats, b: Floats) -> float:
    """Two-sided p-value of the rank-sum test that ``a`` and ``b`` come from one distribution; ties are allowed.

    Exact over all arrangements of the (mid-)ranks up to ``EXACT_RANKS`` values, else the normal approximation with
    tie and continuity correction (Mann and Whitney, 1947). 1.0 where a side is empty.
    """
    n, m = len(a), len(b)
    if n == 0 or m == 0:
        return 1.0
    doubled = _doubled_ranks(np.concatenate([a, b]))
    total = int(doubled[:n].sum())
    expected = n * (n + m + 1)  # twice the mean rank sum, in doubled ranks
    if n + m <= EXACT_RANKS:
        return _exact_rank_sum(doubled, n, abs(total - expected))
    _, ties = np.unique(doubled, return_counts=True)
    size = n + m
    spread = (size + 1) - float((ties**3 - ties).sum()) / (size * (size - 1))
    variance = n * m / 12 * spread
    if variance <= 0:
        return 1.0
    away = max(0.0, abs(total - expected) / 2 - 0.5)
    return _two_sided(away / math.sqrt(variance))


def smallest_p(n: int, m: int) -> float:
    """The smallest two-sided p-value that samples of ``n`` and ``m`` can give: complete separation.

    asv applies the same check before it uses a test.
    """
    return min(1.0, 2 / math.comb(n + m, n))


def paired(differences: Floats) -> float:
    """The p-value of ``paired_each`` for one test, shape ``(users,)``."""
    return float(paired_each(differences[None])[0])


def paired_each(differences: Floats) -> Floats:
    """Two-sided p-values of the paired randomisation test: is the sign of every user's difference a coin's?

    Exact up to ``EXACT_SIGNS`` users who differ, else by the normal approximation of the sum of signed differences
    (Smucker, Allan and Carterette, CIKM 2007, compare it with the other paired tests of retrieval).

    Args:
        differences: one test a line, shape ``(tests, users)``; the result has shape ``(tests,)``.
    """
    moved = np.count_nonzero(differences, axis=1)
    sums, squares = np.abs(differences.sum(axis=1)), np.square(differences).sum(axis=1)
    z = np.divide(sums, np.sqrt(squares), out=np.zeros_like(sums), where=squares > 0)
    return np.array(
        [
            _two_sided(float(z[test])) if count > EXACT_SIGNS else _exact_signs(differences[test], float(sums[test]))
            for test, count in enumerate(moved)
        ]
    )


def _exact_signs(differences: Floats, observed: float) -> float:
    """Share of the sign patterns of the differences that are not 0 whose sum is as far from 0 as the observed one."""
    moved = differences[differences != 0]
    patterns = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
    sums = np.abs((2 * patterns - 1) @ moved)
    return float((sums >= observed - 1e-12).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where the result is below the level of the whole family (Holm, 1979)."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - place) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def student_t(freedom: float) -> float:
    """The 99.5 % quantile of Student's t distribution; tabled up to ten degrees of freedom, then to 0.5 %."""
    if freedom <= len(_STUDENT_T):
        return _STUDENT_T[int(freedom) - 1]
    z = 2.5758
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


_STUDENT_T = (63.657, 9.9248, 5.8409, 4.6041, 4.0321, 3.7074, 3.4995, 3.3554, 3.2498, 3.1693)


def welch(a: Floats, b: Floats) -> tuple[float, float]:
    """The 95 % interval of the difference of two means, ``b - a``, of unequal variances (Welch, 1947).

    Both sides have two values or more, so it is wide: with two and two its freedom is 1 to 2.
    """
    difference = float(b.mean() - a.mean())
    parts = [float(values.var(ddof=1)) / len(values) for values in (a, b)]
    total = sum(parts)
    if total == 0:
        return difference, difference
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    reach = _student_t_95(freedom) * math.sqrt(total)
    return difference - reach, difference + reach


def _student_t_95(freedom: float) -> float:
    """The 97.5 % quantile of Student's t distribution; the table's next smaller freedom up to ten, then to 0.5 %."""
    if freedom < len(_STUDENT_T_95) + 1:
        return _STUDENT_T_95[max(1, int(freedom)) - 1]
    z = 1.95996
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


_STUDENT_T_95 = (12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def interval(draws: Floats | Sequence[float]) -> tuple[float, float]:
    """The percentile interval of resampled values, shape ``(draws,)``."""
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), TAILS)
    return float(low), float(high)


def median_ratio_interval(old: Floats, new: Floats) -> tuple[float, float]:
    """95 % interval of ``median(new) / median(old)`` of positive values, shapes ``(n,)`` and ``(m,)``.

    It assumes no distribution: the standard error of the logarithm of each median is that between two order statistics
    around it (Price and Bonett, Distribution-free confidence intervals for difference and ratio of medians, 2002).
    """
    centre = math.log(float(np.median(new)) / float(np.median(old)))
    width = NormalDist().inv_cdf(TAILS[1]) * math.hypot(_log_median_error(old), _log_median_error(new))
    return math.exp(centre - width), math.exp(centre + width)


def paired_ratio_interval(old: Floats, new: Floats) -> tuple[float, float] | None:
    """95 % interval of ``mean(new) / mean(old)`` over the same users, shape ``(users,)``, by the delta method.

    ``None`` where a mean is not positive.
    """
    means = float(old.mean()), float(new.mean())
    if min(means) <= 0:
        return None
    error = float((new / means[1] - old / means[0]).std()) / math.sqrt(len(old))
    centre, width = math.log(means[1] / means[0]), NormalDist().inv_cdf(TAILS[1]) * error
    return math.exp(centre - width), math.exp(centre + width)


def _log_median_error(values: Floats) -> float:
    """Standard error of the logarithm of a median; 0 for a single value, which does not show it."""
    n = len(values)
    place = max(1, round((n + 1) / 2 - math.sqrt(n)))
    below, above = np.log(np.partition(values, (place - 1, n - place))[[place - 1, n - place]])
    z = (n + 1 - 2 * place) / math.sqrt(n)  # of the number of values below the median, as a normal variable
    return float(above - below) / (2 * z) if z > 0 else 0.0


def quantiles(values: Floats, most: int) -> Floats:
    """``values`` sorted, or, of more than ``most``, as many evenly spaced quantiles of them."""
    if len(values) <= most:
        return np.sort(values)
    return np.quantile(values, (np.arange(most) + 0.5) / most)


def _doubled_ranks(values: Floats) -> npt.NDArray[np.int64]:
    """Twice the mid-ranks from 1, which are whole numbers also for ties."""
    ordered = np.sort(values)
    below, upto = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (below + upto + 1).astype(np.int64)


def _exact_rank_sum(doubled: npt.NDArray[np.int64], n: int, away: int) -> float:
    """Share of the choices of ``n`` ranks whose sum is at least ``away`` from its mean (both in doubled ranks)."""
    highest = int(doubled.sum())
    ways = np.zeros((n + 1, highest + 1))  # below 2**53 for EXACT_RANKS values, so exact in float64
    ways[0, 0] = 1
    for rank in map(int, doubled):
        ways[1:, rank:] += ways[:-1, : highest + 1 - rank].copy()
    sums = np.arange(highest + 1)
    far = np.abs(sums - n * (len(doubled) + 1)) >= away
    return float(ways[n, far].sum() / math.comb(len(doubled), n))


def _two_sided(z: float) -> float:
    return math.erfc(z / math.sqrt(2))
