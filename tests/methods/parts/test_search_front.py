"""Pareto set, hypervolume and copula, each against its definition."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from tpme.methods.parts.search_front import copula, hypervolume, non_dominated


def brute_force(points: list[tuple[float, float]]) -> list[bool]:
    return [not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points) for p in points]


@pytest.mark.parametrize("seed", range(5))
def test_the_pareto_set_equals_brute_force(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 6, (40, 2)).astype(float)  # with ties and equal points
    assert non_dominated(points).tolist() == brute_force([(x, y) for x, y in points.tolist()])


def test_fewer_parameters_and_a_higher_ndcg_dominate() -> None:
    trials = [(-100, 0.3), (-50, 0.3), (-100, 0.4), (-200, 0.2)]
    assert non_dominated(np.array(trials)).tolist() == [False, True, True, False]


def test_one_point_and_equal_points_stay_and_a_failed_trial_never_does() -> None:
    assert non_dominated(np.array([[1.0, 2.0]])).tolist() == [True]
    assert non_dominated(np.array([[1.0, 2.0]] * 2)).tolist() == [True, True]
    assert non_dominated(np.array([[9.0, np.nan], [1.0, 2.0], [np.nan, np.nan]])).tolist() == [False, True, False]
    assert non_dominated(np.empty((0, 2))).tolist() == []


def test_hypervolume_equals_counted_cells() -> None:
    random = np.random.default_rng(1)
    points = random.integers(0, 12, (15, 2)).astype(float)
    cells = np.stack(np.meshgrid(np.arange(12), np.arange(12)), axis=-1).reshape(-1, 2)
    reference = np.array([2.0, 3.0])
    covered = [(cell >= reference).all() and (points >= cell + 1).all(axis=1).any() for cell in cells]
    assert hypervolume(points, reference) == sum(covered)
    assert hypervolume(points[:0], reference) == 0


def test_a_further_point_never_lowers_the_hypervolume() -> None:
    points = np.random.default_rng(2).normal(size=(30, 2))
    areas = [hypervolume(points[:n], np.array([-1.0, -1.0])) for n in range(31)]
    assert areas == sorted(areas)
    assert areas[-1] > areas[1]


def test_the_copula_is_monotone_and_keeps_what_dominates() -> None:
    random = np.random.default_rng(3)
    points = np.stack([-(10 ** random.uniform(2, 6, 50)), random.uniform(0, 0.2, 50)], axis=1)
    transformed = copula(points, points)
    assert (np.argsort(transformed, axis=0) == np.argsort(points, axis=0)).all()
    assert non_dominated(transformed).tolist() == non_dominated(points).tolist()
    worst = copula(points, points.min(axis=0)[None])[0]
    assert (transformed >= worst).all()
    for value, quantile in zip(points.ravel(), transformed.ravel(), strict=True):
        share = (points[:, int(value >= 0)] <= value).mean()
        assert quantile == pytest.approx(NormalDist().inv_cdf(min(share, 1 - 1e-4)))
    assert np.abs(copula(points, np.array([[-np.inf, np.inf]]))) == pytest.approx(3.719, abs=1e-3)
