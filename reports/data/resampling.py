"""Intervals for TPME by resampling: how far a row's value and rank might differ in another run.

*Resampled*, for each row independently, because each cell ran in its own process at its own time:

- the finished **seeds**, with replacement; a drawn seed brings its epochs and its peak memory;
- for each drawn seed the training times of its **epochs after warm-up**, with replacement; their median is its T, or
  their sum where T is that of all of them.

T and M of a draw are means over its seeds, as in the tables. Each draw has the frame of its own T and M (a frozen frame
stays fixed), from which TPME and ranks follow. Intervals are percentile intervals (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13).

*Not resampled*: P, which is exact; the compared rows; the weights; the machine. Epochs count as independent, so the
interval covers neither a drift over a whole run nor the difference between two runs of one cell
(``tpme doctor --noise``).

*With one seed* T varies over its epochs alone and M not at all: the effect of another seed is unknown, so the interval
is too narrow. With one seed and one epoch nothing was repeated, and the row has no interval. A handful of seeds is
still too few for a good interval: for ``n`` seeds the draws vary by ``sqrt((n - 1) / n)`` of what they should.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from tpme.reports.data.stats import LEVEL, Floats, interval
from tpme.reports.data.tpme import COLUMNS, Frame, Weights

DRAWS = 2000
_SEED = 20240711

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Repeats:
    """Repeated measurements of one row."""

    epochs_s: tuple[Floats, ...]
    """Training times of the epochs after warm-up of each seed (seconds)."""
    memory_bytes: Floats
    """M of each seed, shape ``(seeds,)``."""
    trainable_millions: float
    summed: bool = False
    """T is the sum of the times of a seed rather than their median."""

    @property
    def several(self) -> bool:
        """Whether there is anything to resample."""
        return sum(map(len, self.epochs_s)) > 1


@dataclass(frozen=True)
class Resampled:
    """TPME of all rows in every draw."""

    rows: tuple[str, ...]
    tpme: Floats
    """Shape ``(draws, rows)``."""
    ranks: Ints
    """From 1, equal values share the better rank; shape ``(draws, rows)``."""

    def interval(self, row: str, value: float) -> tuple[float, float]:
        """The 95 % interval of TPME of ``row``, extended to the measured ``value``.

        The extension is needed because the min and max of a draw lie outside the measured ones more often than inside,
        which can push nearly all draws of a row at the edge of the frame to one side.
        """
        low, high = interval(self.tpme[:, self.rows.index(row)])
        return min(low, value), max(high, value)

    def rank_interval(self, row: str) -> tuple[int, int]:
        """The 95 % interval of the rank of ``row``."""
        ranks = np.sort(self.ranks[:, self.rows.index(row)])
        outside = int(len(ranks) * (1 - LEVEL) / 2)
        return int(ranks[outside]), int(ranks[-1 - outside])


def resample(draws: Mapping[str, Floats], weights: Weights, frame: Frame | None = None) -> Resampled:
    """TPME and ranks of the K rows in every draw; equal input gives equal output.

    Args:
        draws: the result of ``draw`` for each row, at least one.
        weights: of T, P and M.
        frame: a frozen frame; without one each draw has its own.
    """
    costs = np.stack(list(draws.values()), axis=1)  # (draws, rows, 3)
    if frame is None:
        low, high = costs.min(axis=1, keepdims=True), costs.max(axis=1, keepdims=True)
    else:
        spans = [getattr(frame, name) for name in COLUMNS]
        low, high = np.array([span.min for span in spans]), np.array([span.max for span in spans])
    reach = np.broadcast_to(high - low, costs.shape)
    terms = np.divide(costs - low, reach, out=np.zeros_like(costs), where=reach > 0)
    tpme = terms @ np.array(weights.values)
    return Resampled(tuple(draws), tpme, _ranks(tpme.round(12)))


def _ranks(values: Floats) -> Ints:
    """Ranks within each draw, from 1; equal values share the better rank."""
    return pd.DataFrame(values).rank(axis=1, method="min").to_numpy(dtype=np.int64)


def draw(name: str, row: Repeats) -> Floats:
    """T, P and M of one row in each of ``DRAWS`` draws, shape ``(draws, 3)``.

    The generator is seeded by the name, so another row does not change these draws.
    """
    generator = np.random.default_rng([_SEED, zlib.crc32(name.encode())])
    seeds = len(row.epochs_s)
    chosen = generator.integers(seeds, size=(DRAWS, seeds))
    times = _sums if row.summed else _medians
    time_s = times(row.epochs_s, chosen, generator).mean(axis=1)
    memory = row.memory_bytes[chosen].mean(axis=1)
    return np.column_stack([time_s, np.full(DRAWS, row.trainable_millions), memory])


def _sums(samples: Sequence[Floats], chosen: Ints, generator: np.random.Generator) -> Floats:
    """For each entry of ``chosen`` the sum of a resample of ``samples[entry]``."""
    drawn = [
        values[generator.integers(len(values), size=(*chosen.shape, len(values)))].sum(axis=-1) for values in samples
    ]
    return np.asarray(np.choose(chosen, drawn) if len(drawn) > 1 else drawn[0])


def _medians(samples: Sequence[Floats], chosen: Ints, generator: np.random.Generator) -> Floats:
    """For each entry of ``chosen`` the median of a resample of ``samples[entry]``, without drawing the resample.

    The k-th smallest of n uniform numbers is distributed as Beta(k, n + 1 - k), and what lies between it and the next
    one is the share Beta(1, n - k) of the rest (David and Nagaraja, Order Statistics, 2003); n times that number,
    rounded down, is the place of the k-th smallest value drawn.
    """
    ordered = np.concatenate([np.sort(values) for values in samples])
    sizes = np.array([len(values) for values in samples])
    start, n = (np.cumsum(sizes) - sizes)[chosen], sizes[chosen]
    k = (n + 1) // 2
    lower = generator.beta(k, n + 1 - k)
    upper = np.where(n % 2, lower, lower + (1 - lower) * generator.beta(1, np.maximum(n - k, 1)))
    below, above = (ordered[start + np.minimum(n * place, n - 1).astype(np.int64)] for place in (lower, upper))
    return np.asarray((below + above) / 2)
