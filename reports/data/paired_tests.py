"""Differences in quality between rows: paired tests over users, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tpme.reports.data.stats import Floats, holm, paired_each

P_LEVEL = 0.05
"""Of a whole family of paired tests, after Holm's correction."""


@dataclass(frozen=True)
class Difference:
    """Two rows on the same users."""

    first: str
    second: str
    difference: float
    """Mean over users of first minus second."""
    p: float
    """Adjusted by Holm's method over all pairs."""

    @property
    def significant(self) -> bool:
        """Whether the rows differ at the level of the whole family of tests."""
        return self.p < P_LEVEL


def differences_of(values: Mapping[str, Floats]) -> list[Difference]:
    """Every pair of rows, tested by paired randomisation over users (``stats.paired``).

    Args:
        values: the metric of every user, mean over the seeds of a row; shape ``(users,)`` each, the same users.
    """
    gains = np.array(list(values.values()))
    means, p_values = list[float](), list[float]()
    for place in range(len(values) - 1):
        apart = gains[place] - gains[place + 1 :]
        means += apart.mean(axis=1).tolist()
        p_values += paired_each(apart).tolist()
    return [
        Difference(first, second, mean, p)
        for (first, second), mean, p in zip(combinations(values, 2), means, holm(p_values), strict=True)
    ]
