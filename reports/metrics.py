"""Recall@K and NDCG@K from recorded ranks, with intervals over users.

Every user has one target, so Recall@K is the hit rate and NDCG@K is ``1 / log2(1 + rank)`` for a hit (the ideal
DCG is 1). A target the user already had is masked in the ranking and never hits, whatever rank was recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from tpme.bench.errors import UserError

if TYPE_CHECKING:  # load.py reports what is computed here
    from tpme.reports.load import Ranks

Floats = npt.NDArray[np.float64]
Metric = Literal["recall", "ndcg"]

METRICS: tuple[Metric, ...] = ("recall", "ndcg")
CUTOFFS = (5, 10, 20)
SPLIT_CUTOFF = 10
"""The cut-off at which warm and cold targets are told apart."""
RESAMPLES = 1000
LEVEL = 0.95


def gains(ranks: Ranks, metric: Metric, k: int) -> Floats:
    """What each user adds to the metric at cut-off ``k``; shape ``(users,)``, values in [0, 1]."""
    hit: npt.NDArray[np.bool_] = (ranks.rank <= k) & ~ranks.in_history.astype(bool)
    if metric == "recall":
        return hit.astype(np.float64)
    return np.where(hit, 1 / np.log2(1 + np.maximum(ranks.rank, 1)), 0.0)


def bootstrap_means(values: Floats, members: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means of each column over users drawn with replacement; shape ``(resamples, columns)``.

    Args:
        values: shape ``(users, columns)``.
        members: shape ``(users, columns)``, 1 where a user counts towards a column and 0 elsewhere. A column
            none of whose users were drawn gives NaN.
        resamples: how often to draw.
        seed: the draws depend on it and the number of users alone, so they are the same for every method.
    """
    users = len(values)
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // max(users, 1))  # bounds the memory at a million users
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(users, size=(size, users)) + users * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users).astype(np.float64)
        with np.errstate(invalid="ignore"):
            parts.append((weights @ (values * members)) / (weights @ members))
    return np.concatenate(parts)


def quality(
    rows: Mapping[str, Sequence[Ranks]], cutoffs: Sequence[int] = CUTOFFS, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Quality of every row from the ranks of its seeds; the index holds the names of the rows.

    Columns ``recall_10``, ``ndcg_10`` ... are means over users and seeds; ``*_low`` and ``*_high`` bound the 95 %
    bootstrap interval over users of the mean over seeds; ``*_sd`` is the standard deviation over seeds (NaN for
    one). ``recall_10_warm`` and ``_cold`` split by whether the target occurs in training. ``cannot_hit`` is the
    share of masked targets; ``users`` and ``users_cold`` are counts.

    Raises:
        UserError: the seeds of a row were tested on different users.
    """
    columns = ["users", "users_cold", "cannot_hit"]
    columns += [f"{name}{end}" for name, *_ in _columns(cutoffs) for end in ("", "_low", "_high", "_sd")]
    lines: dict[str, dict[str, float]] = {}
    by_users: dict[int, list[str]] = {}
    for name, seeds in rows.items():
        by_users.setdefault(len(seeds[0].rank), []).append(name)
        lines[name] = _one_row(name, seeds, cutoffs)
    for users, names in by_users.items():
        if users:
            _add_intervals(lines, {name: rows[name] for name in names}, cutoffs, resamples, seed)
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns, dtype=np.float64)


def _columns(cutoffs: Sequence[int]) -> list[tuple[str, Metric, int, str]]:
    """Name, metric, cut-off and share of the users of every reported mean."""
    everyone = [(f"{metric}_{k}", metric, k, "all") for k in cutoffs for metric in METRICS]
    parts = [
        (f"{metric}_{SPLIT_CUTOFF}_{part}", metric, SPLIT_CUTOFF, part)
        for part in ("warm", "cold")
        for metric in METRICS
    ]
    return everyone + parts


def _members(ranks: Ranks, part: str) -> npt.NDArray[np.bool_]:
    cold = ranks.cold.astype(bool)
    return {"all": np.ones_like(cold), "warm": ~cold, "cold": cold}[part]


def _one_row(name: str, seeds: Sequence[Ranks], cutoffs: Sequence[int]) -> dict[str, float]:
    first = seeds[0]
    for other in seeds[1:]:
        if not np.array_equal(first.target, other.target):
            raise UserError(f"{name}: its seeds were tested on different users or targets; report the runs apart")
    values: dict[str, float] = {
        "users": len(first.rank),
        "users_cold": int(first.cold.astype(bool).sum()),
        "cannot_hit": float(first.in_history.astype(bool).mean()) if len(first.rank) else np.nan,
    }
    for column, metric, k, part in _columns(cutoffs):
        members = _members(first, part)
        means = [float(gains(ranks, metric, k)[members].mean()) if members.any() else np.nan for ranks in seeds]
        values[column] = float(np.mean(means))
        values[f"{column}_sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else np.nan
    return values


def _add_intervals(
    lines: dict[str, dict[str, float]],
    rows: Mapping[str, Sequence[Ranks]],
    cutoffs: Sequence[int],
    resamples: int,
    seed: int,
) -> None:
    values, members, cells = [], [], []
    for name, seeds in rows.items():
        for column, metric, k, part in _columns(cutoffs):
            values.append(np.mean([gains(ranks, metric, k) for ranks in seeds], axis=0))
            members.append(_members(seeds[0], part).astype(np.float64))
            cells.append((name, column))
    means = bootstrap_means(np.stack(values, axis=1), np.stack(members, axis=1), resamples, seed)
    low, high = _interval(means)
    for (name, column), bottom, top in zip(cells, low, high, strict=True):
        lines[name] |= {f"{column}_low": float(bottom), f"{column}_high": float(top)}


def _interval(means: Floats) -> tuple[Any, Any]:
    """Percentile interval of each column, NaN where a column has no members."""
    bounds = np.full((2, means.shape[1]), np.nan)
    known = ~np.isnan(means).all(axis=0)
    tail = (1 - LEVEL) / 2
    bounds[:, known] = np.nanquantile(means[:, known], [tail, 1 - tail], axis=0)
    return bounds[0], bounds[1]
