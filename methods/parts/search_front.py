"""Two objectives, both to be maximised: which points no other one dominates, and the area that they dominate."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Points = NDArray[np.float64]
CLAMP = 1e-4
"""Distance of a copula's probabilities from 0 and 1."""


def non_dominated(points: Points) -> NDArray[np.bool_]:
    """Whether no other point is as good in both objectives and better in one: (n, 2) to (n,).

    Equal points all stay; one with a NaN never does.
    """
    as_good = np.all(points[None] >= points[:, None], axis=2)
    better = np.any(points[None] > points[:, None], axis=2)
    dominated: NDArray[np.bool_] = np.any(as_good & better, axis=1)
    return ~dominated & ~np.isnan(points).any(axis=1)


def hypervolume(points: Points, reference: Points) -> float:
    """Area that ``points`` (n, 2) dominate above ``reference`` (2,)."""
    area, height = 0.0, float(reference[1])
    for x, y in sorted(points[(points > reference).all(axis=1)].tolist(), reverse=True):
        area += (x - float(reference[0])) * max(y - height, 0.0)
        height = max(height, y)
    return area


def copula(points: Points, values: Points) -> Points:
    """Each objective of ``values`` (m, 2) as the normal quantile of its share of ``points`` (n, 2) that are no larger.

    AutoPEFT's transform: both objectives get the same scale, whatever theirs is. Shares are clamped to
    [1e-4, 1 - 1e-4]. Monotone, so what dominates stays the same.
    """
    shares = (points[None] <= values[:, None]).mean(axis=1)
    quantiles: Points = torch.special.ndtri(torch.from_numpy(shares.clip(CLAMP, 1 - CLAMP))).numpy()
    return quantiles
