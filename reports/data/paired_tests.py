"""Differences in quality between rows: paired tests over users, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from tpme.reports.data.stats import Floats, holm, paired

P_LEVEL = 0.05


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
    pairs = list(combinations(values, 2))
    adjusted = holm([paired(values[first] - values[second]) for first, second in pairs])
    return [
        Difference(first, second, float((values[first] - values[second]).mean()), p)
        for (first, second), p in zip(pairs, adjusted, strict=True)
    ]
