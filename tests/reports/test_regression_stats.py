"""The gate's tests against enumeration, and against what must hold of any test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest

from tpme.reports.data import stats
from tpme.reports.data.stats import holm, mann_whitney, paired, quantiles, smallest_p

Floats = npt.NDArray[np.float64]


def enumerated(a: Floats, b: Floats) -> float:
    """Two-sided rank-sum p-value over all ways to call ``len(a)`` of the values the first sample."""
    values = np.concatenate([a, b])
    ranks = np.array([(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values])
    middle = len(a) * (len(values) + 1) / 2
    seen = abs(ranks[: len(a)].sum() - middle)
    ways = itertools.combinations(range(len(values)), len(a))
    return float(np.mean([abs(ranks[list(way)].sum() - middle) >= seen - 1e-9 for way in ways]))


@pytest.mark.parametrize("seed", range(20))
def test_mann_whitney_counts_every_arrangement(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = (int(size) for size in rng.integers(1, 8, 2))
    # Few distinct values: ties within and across the samples.
    a, b = rng.integers(0, 6, n).astype(float), rng.integers(1, 7, m).astype(float)
    assert mann_whitney(a, b) == pytest.approx(enumerated(a, b), abs=1e-12)
    a, b = rng.normal(size=n), rng.normal(1, size=m)
    assert mann_whitney(a, b) == pytest.approx(enumerated(a, b), abs=1e-12)


def test_the_normal_approximation_joins_the_exact_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for shift, digits in itertools.product((0.0, 0.5, 1.0), (0, 3)):
        a, b = np.round(rng.normal(size=20), digits), np.round(rng.normal(shift, size=20), digits)
        exact = mann_whitney(a, b)
        monkeypatch.setattr(stats, "EXACT_RANKS", 0)
        assert mann_whitney(a, b) == pytest.approx(exact, abs=0.004)
        monkeypatch.undo()


def test_large_samples_without_a_difference_seldom_reject() -> None:
    rng = np.random.default_rng(2)
    p = [mann_whitney(rng.normal(size=60), rng.normal(size=50)) for _ in range(1000)]
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.07


def test_mann_whitney_of_nothing_or_of_one_value_cannot_reject() -> None:
    assert mann_whitney(np.empty(0), np.ones(9)) == 1.0
    assert mann_whitney(np.ones(50), np.ones(50)) == 1.0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (4, 7), (6, 6), (12, 3)])
def test_the_smallest_p_is_that_of_complete_separation(n: int, m: int) -> None:
    assert smallest_p(n, m) == pytest.approx(mann_whitney(np.arange(n) * 1.0, 100.0 + np.arange(m)))


def test_paired_counts_every_sign() -> None:
    differences = np.array([0.5, -0.2, 0.0, 0.3, 0.3, 0.0, 1.0, -0.1])
    moved = differences[differences != 0]
    sums = [abs(np.dot(signs, moved)) for signs in itertools.product((-1, 1), repeat=len(moved))]
    assert paired(differences) == pytest.approx(np.mean(np.array(sums) >= abs(moved.sum()) - 1e-12))
    assert paired(np.zeros(10)) == 1.0


def test_paired_of_many_users_agrees_with_drawn_signs() -> None:
    rng = np.random.default_rng(3)
    differences = np.where(rng.random(400) < 0.3, rng.choice([-1.0, 1.0], 400, p=[0.42, 0.58]), 0.0)
    signs = rng.choice([-1.0, 1.0], size=(20_000, 400))
    drawn = float(np.mean(np.abs(signs @ differences) >= abs(differences.sum())))
    assert paired(differences) == pytest.approx(drawn, abs=0.03)


def test_holm_by_hand() -> None:
    # 3 x 0.01; 2 x 0.03; the last may not undercut the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_quantiles_keep_the_shape_of_a_long_sample() -> None:
    values = np.random.default_rng(4).lognormal(size=5000)
    kept = quantiles(values, 100)
    assert len(kept) == 100
    assert np.all(np.diff(kept) >= 0)
    assert np.median(kept) == pytest.approx(np.median(values), rel=0.02)
    assert quantiles(values[:7], 100).tolist() == sorted(values[:7])


def test_quantiles_err_on_the_quiet_side() -> None:
    """Kept quantiles against new values of the same law: fewer rejections than the level says."""
    rng = np.random.default_rng(5)
    p = [mann_whitney(quantiles(rng.normal(size=2000), 100), rng.normal(size=100)) for _ in range(400)]
    assert np.mean(np.array(p) < 0.05) < 0.05
    assert math.isfinite(sum(p))
