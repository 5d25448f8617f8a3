"""The ranks that a cell recorded, and what each user adds to Recall@K and NDCG@K.

Every user has one target, so Recall@K is the hit rate and NDCG@K is ``1 / log2(1 + rank)`` for a hit (the ideal
DCG is 1). A target the user already had is masked in the ranking and never hits, whatever rank was recorded.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tpme.bench.quantities import CUTOFFS
from tpme.bench.side_files import UserRanks, load_ranks
from tpme.reports.data.stats import Floats

Metric = Literal["recall", "ndcg"]

METRICS: tuple[Metric, ...] = ("recall", "ndcg")
REPORTED: tuple[tuple[Metric, int], ...] = tuple((metric, k) for k, metric in product(CUTOFFS, METRICS))
"""The metrics and cut-offs of every table."""


def gains(ranks: UserRanks, metric: Metric, k: int) -> Floats:
    """What each user adds to the metric at cut-off ``k``; shape ``(users,)``, values in [0, 1]."""
    hit: npt.NDArray[np.bool_] = (ranks.rank <= k) & ~ranks.in_history.astype(bool)
    if metric == "recall":
        return hit.astype(np.float64)
    return np.where(hit, 1 / np.log2(1 + np.maximum(ranks.rank, 1)), 0.0)


def mean_gains(path: Any) -> list[float]:
    """The mean over users of every metric in ``REPORTED``; NaN for a cell that left no ranks."""
    ranks = load_ranks(path) if isinstance(path, str) else None  # pandas may turn None into NaN
    if ranks is None:
        return [np.nan] * len(REPORTED)
    return [float(gains(ranks, metric, k).mean()) for metric, k in REPORTED]
