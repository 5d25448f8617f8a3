"""Recall@K and NDCG@K of rows over their seeds, with bootstrap intervals over users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from tpme.bench.errors import UserError
from tpme.bench.side_files import UserRanks
from tpme.reports.data.stats import TAILS, Floats
from tpme.reports.data.user_ranks import METRICS, REPORTED, Metric, gains

SPLIT_CUTOFF = 10
"""The cut-off at which warm and cold targets are told apart."""
RESAMPLES = 1000


def spread(values: Floats) -> float:
    """Standard deviation over seeds; NaN for less than two, exactly 0 for equal values."""
    if len(values) < 2:
        return np.nan
    return float(values.std(ddof=1)) if np.ptp(values) else 0.0


def over_seeds(rows: Iterable[str], values: Mapping[tuple[str, str], Sequence[float]]) -> pd.DataFrame:
    """Mean and standard deviation (``<key>_sd``) over seeds of the values of each (row, key); NaN where there are none.

    The index holds ``rows``; the columns come in the order in which ``values`` names their keys.
    """
    columns: dict[str, dict[str, float]] = {}
    for (row, key), of_seeds in values.items():
        columns.setdefault(key, {})[row] = float(np.mean(of_seeds)) if of_seeds else np.nan
        columns.setdefault(f"{key}_sd", {})[row] = spread(np.array(of_seeds))
    return pd.DataFrame(columns, index=pd.Index(list(rows), dtype=object), dtype=np.float64)


def bootstrap_means(values: Floats, members: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means of each column over users drawn with replacement; shape ``(resamples, columns)``.

    Args:
        values: shape ``(users, columns)``.
        members: shape ``(users, columns)``, 1 where a user counts towards a column and 0 elsewhere. A column is NaN
            in a draw without any of its users.
        resamples: number of draws.
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


def quality(rows: Mapping[str, Sequence[UserRanks]], resamples: int = RESAMPLES) -> pd.DataFrame:
    """Quality of every row from the ranks of its seeds; the index holds the names of the rows.

    Columns ``recall_10``, ``ndcg_10`` ... are means over users and seeds; ``*_low`` and ``*_high`` bound the 95 %
    bootstrap interval over users of the mean over seeds; ``*_sd`` is the standard deviation over seeds (NaN for
    one). ``recall_10_warm`` and ``_cold`` split by whether the target occurs in training. ``cannot_hit`` is the
    share of masked targets; ``users`` and ``users_cold`` are counts.

    Raises:
        UserError: the seeds of a row were tested on different users.
    """
    columns = ["users", "users_cold", "cannot_hit"]
    columns += [f"{name}{end}" for name, *_ in _MEANS for end in ("", "_low", "_high", "_sd")]
    lines = {name: _counts(name, seeds) for name, seeds in rows.items()}
    for users in {len(seeds[0].rank) for seeds in rows.values()} - {0}:
        alike = {name: seeds for name, seeds in rows.items() if len(seeds[0].rank) == users}
        _add_means(lines, alike, resamples)
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns, dtype=np.float64)


_MEANS: tuple[tuple[str, Metric, int, str], ...] = (
    *((f"{metric}_{k}", metric, k, "all") for metric, k in REPORTED),
    *(
        (f"{metric}_{SPLIT_CUTOFF}_{part}", metric, SPLIT_CUTOFF, part)
        for part, metric in product(("warm", "cold"), METRICS)
    ),
)
"""Name, metric, cut-off and share of the users of every reported mean."""


def _counts(name: str, seeds: Sequence[UserRanks]) -> dict[str, float]:
    first = seeds[0]
    for other in seeds[1:]:
        if not np.array_equal(first.target, other.target):
            raise UserError(f"{name}: its seeds were tested on different users or targets; report the runs apart")
    return {
        "users": len(first.rank),
        "users_cold": int(first.cold.astype(bool).sum()),
        "cannot_hit": float(first.in_history.astype(bool).mean()) if len(first.rank) else np.nan,
    }


def _add_means(lines: dict[str, dict[str, float]], rows: Mapping[str, Sequence[UserRanks]], resamples: int) -> None:
    """Add every mean with its deviation and interval to the lines of rows tested on equally many users."""
    values, counted, cells = [], [], []
    for name, seeds in rows.items():
        cold = seeds[0].cold.astype(bool)
        parts = {"all": np.ones_like(cold), "warm": ~cold, "cold": cold}
        stacked = {key: np.stack([getattr(seed, key) for seed in seeds]) for key in ("rank", "in_history")}
        of_users = {(metric, k): gains(replace(seeds[0], **stacked), metric, k) for metric, k in REPORTED}
        for column, metric, k, part in _MEANS:
            members, of_seeds = parts[part], of_users[metric, k]  # shapes (users,) and (seeds, users)
            means = np.compress(members, of_seeds, axis=1).mean(axis=1) if members.any() else np.array([np.nan])
            lines[name][column] = float(means.mean())
            lines[name][f"{column}_sd"] = spread(means)
            values.append(of_seeds.mean(axis=0))
            counted.append(members.astype(np.float64))
            cells.append((lines[name], column))
    drawn = bootstrap_means(np.stack(values, axis=1), np.stack(counted, axis=1), resamples)
    for (line, column), low, high in zip(cells, *_interval(drawn), strict=True):
        line |= {f"{column}_low": float(low), f"{column}_high": float(high)}


def _interval(means: Floats) -> tuple[Any, Any]:
    """Percentile interval of each column, NaN where a column has no members."""
    bounds = np.full((2, means.shape[1]), np.nan)
    unknown = np.isnan(means)
    some, whole = ~unknown.all(axis=0), ~unknown.any(axis=0)
    for columns, quantile in ((whole, np.quantile), (some & ~whole, np.nanquantile)):  # nanquantile is a slow loop
        bounds[:, columns] = quantile(means[:, columns], TAILS, axis=0)
    return bounds[0], bounds[1]
