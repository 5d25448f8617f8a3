"""Ties in TPME: rows that differ by no more than two runs of one cell do share a rank.

How much two runs of one cell differ is the noise floor of the device (``tpme doctor --noise``). Where none was
measured, the spread over seeds stands for it: two runs differ by up to ``1.96 * sqrt(2)`` standard deviations in 95 %
of all cases, the deviation relative to the mean and pooled over the rows. Without either no tie is claimed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tpme.reports.data.tpme import COLUMNS, Frame, Span, Weights

RUNS_APART = 1.96 * math.sqrt(2)
"""Standard deviations by which two runs differ at most, in 95 % of all cases."""


@dataclass(frozen=True)
class RunNoise:
    """How much two runs of one cell differ, as a share of the value."""

    time: float
    memory: float
    source: str
    """``doctor``, ``seeds``, or empty where it is not known; then both are 0."""
    ours: bool = True
    """Whether any row was measured here, so that the noise of its device can be measured."""

    @property
    def text(self) -> str:
        """A sentence without its full stop."""
        if not self.source and not self.ours:
            return "nothing says how far another run of the same settings differs, so no tie is claimed"
        if not self.source:
            return "how much two runs of one cell differ was not measured (tpme doctor --noise), so no tie is claimed"
        how = "noise floor of the device" if self.source == "doctor" else "spread over seeds"
        time, memory = (f"{100 * share:.2g} %" for share in (self.time, self.memory))
        return f"two runs of one cell differ by up to {time} in time and {memory} in memory in 95 % of cases ({how})"


def noise_of(summary: pd.DataFrame, time: float | None, memory: float | None, *, ours: bool = True) -> RunNoise:
    """The noise of a section.

    Args:
        summary: its compared rows, with ``epoch_time_s``, ``memory_bytes`` and their ``_sd`` over seeds.
        time, memory: the noise floor of the device, where one was measured.
        ours: whether any row was measured here.
    """
    if time is not None and memory is not None:
        return RunNoise(time, memory, "doctor")
    shares = [(summary[f"{name}_sd"] / summary[name]).dropna() for name in ("epoch_time_s", "memory_bytes")]
    if any(share.empty for share in shares):
        return RunNoise(0.0, 0.0, "", ours)
    apart = [RUNS_APART * float(np.sqrt((share**2).mean())) for share in shares]
    return RunNoise(apart[0], apart[1], "seeds")


def tied_ranks(summary: pd.DataFrame, weights: Weights, frame: Frame, noise: RunNoise) -> pd.Series[float]:
    """Ranks by ``tpme``, from 1; a row that noise may have put behind the best row of a rank shares that rank.

    Noise moves the TPME of two rows apart by at most ``sum_i a_i * n_i * max(x_i, y_i) / (max_i - min_i)`` over T and
    M, with their costs ``x`` and ``y``, the weights ``a``, the noise ``n`` and the frame's ends; P is exact.
    """
    order = summary["tpme"].dropna().round(12).sort_values(kind="stable")
    shares = {"epoch_time_s": noise.time, "memory_bytes": noise.memory}
    ranks: pd.Series[float] = pd.Series(np.nan, index=summary.index, name="tpme_rank")
    best, rank = None, 0
    for place, name in enumerate(order.index, start=1):
        apart = math.inf
        if best is not None:
            apart = order[name] - order[best] - _reach(summary.loc[[best, name]], weights, frame, shares)
        if apart > 0:
            best, rank = name, place
        ranks[name] = rank
    return ranks


def _reach(rows: pd.DataFrame, weights: Weights, frame: Frame, shares: dict[str, float]) -> float:
    """How far noise may move the TPME of two rows apart."""
    total = 0.0
    for name, weight in zip(COLUMNS, weights.values, strict=True):
        span: Span = getattr(frame, name)
        if name in shares and span.max > span.min:
            total += weight * shares[name] * float(rows[name].max()) / (span.max - span.min)
    return total
