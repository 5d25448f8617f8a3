"""The statistics of reports and gate against enumeration, against scipy, and against properties of any test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from tpme.reports.data import stats
from tpme.reports.data.stats import holm, mann_whitney, paired, quantiles, smallest_p, student_t

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


# --- scipy as an oracle, properties --------------------------------------------------------------------------

few = settings(max_examples=50, deadline=None)
sizes = st.integers(1, 12)


def sample(size: int, ties: bool) -> st.SearchStrategy[Floats]:
    """Values of a sample: of six distinct ones, or all different."""
    values = st.integers(0, 5) if ties else st.floats(-1e3, 1e3, width=32)
    return arrays(np.float64, size, elements=values, unique=not ties)


@st.composite
def two_samples(draw: st.DrawFn, ties: bool, most: int) -> tuple[Floats, Floats]:
    n, m = draw(st.integers(1, most)), draw(st.integers(1, most))
    values = draw(sample(n + m, ties))
    return values[:n], values[n:]


@few
@given(two_samples(ties=False, most=20))
def test_mann_whitney_without_ties_is_scipys_exact_test(pair: tuple[Floats, Floats]) -> None:
    a, b = pair
    assert mann_whitney(a, b) == pytest.approx(scipy_stats.mannwhitneyu(a, b, method="exact").pvalue, rel=1e-9)


@few
@given(two_samples(ties=True, most=6))
def test_mann_whitney_with_ties_is_the_share_of_all_arrangements(pair: tuple[Floats, Floats]) -> None:
    assert mann_whitney(*pair) == pytest.approx(enumerated(*pair), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_mann_whitney_of_many_values_is_scipys_approximation(ties: bool) -> None:
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.2, 1.0):
        a, b = rng.normal(size=50), rng.normal(shift, size=30)
        a, b = (np.round(a), np.round(b)) if ties else (a, b)
        assert len(a) + len(b) > stats.EXACT_RANKS
        expected = scipy_stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=True).pvalue
        assert mann_whitney(a, b) == pytest.approx(expected, rel=1e-9)


@few
@given(two_samples(ties=True, most=30))
def test_mann_whitney_is_symmetric_and_sees_ranks_alone(pair: tuple[Floats, Floats]) -> None:
    a, b = pair
    p = mann_whitney(a, b)
    assert 0 < p <= 1 + 1e-12
    assert mann_whitney(b, a) == pytest.approx(p)
    assert mann_whitney(np.exp(a), np.exp(b)) == pytest.approx(p)


@few
@given(sizes, sizes)
def test_the_smallest_p_is_scipys_of_complete_separation(n: int, m: int) -> None:
    separated = scipy_stats.mannwhitneyu(np.arange(n), 100 + np.arange(m), method="exact")
    assert smallest_p(n, m) == pytest.approx(separated.pvalue)


@few
@given(st.integers(2, 8).flatmap(lambda n: arrays(np.float64, n, elements=st.integers(-4, 4))))
def test_paired_is_scipys_exact_permutation_of_signs(differences: Floats) -> None:
    exact = scipy_stats.permutation_test(
        (differences,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert paired(differences) == pytest.approx(exact.pvalue, abs=1e-12)


def test_paired_of_many_users_is_the_normal_approximation() -> None:
    rng = np.random.default_rng(7)
    for shift in (0.0, 0.05, 0.3):
        differences = rng.normal(shift, size=300)
        z = differences.sum() / np.sqrt((differences**2).sum())
        assert paired(differences) == pytest.approx(2 * scipy_stats.norm.sf(abs(z)), rel=1e-9)


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """Reject a hypothesis where Bonferroni rejects every family that contains it (Marcus and others, 1976)."""
    count = len(p_values)
    families = [family for size in range(1, count + 1) for family in itertools.combinations(range(count), size)]
    bonferroni = {family: min(1.0, len(family) * min(p_values[i] for i in family)) for family in families}
    closed = [max(p for family, p in bonferroni.items() if index in family) for index in range(count)]
    assert holm(p_values) == pytest.approx(closed)


@pytest.mark.parametrize("freedom", [*range(1, 21), 30, 100, 10_000, math.inf])
def test_students_t_is_scipys(freedom: float) -> None:
    assert student_t(freedom) == pytest.approx(scipy_stats.t.ppf(0.995, freedom), rel=5e-3)


@few
@given(st.integers(1, 40).flatmap(lambda n: sample(n, ties=True)), st.integers(1, 40))
def test_quantiles_are_at_most_so_many_ascending_and_within_the_values(values: Floats, most: int) -> None:
    kept = quantiles(values, most)
    assert len(kept) == min(most, len(values))
    assert (np.diff(kept) >= 0).all()
    assert values.min() <= kept.min() <= kept.max() <= values.max()
