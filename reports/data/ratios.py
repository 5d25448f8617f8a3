"""Costs as ratios to one row: a scale that no other row can move.

``c = (t / t_0)^a1 * (p / p_0)^a2 * (m / m_0)^a3`` with the costs ``t_0, p_0, m_0`` of the reference row and the weights
of TPME: the weighted geometric mean of the three ratios. It is the mean that does not depend on which row is the
reference, up to a factor that all rows share (Fleming and Wallace, Communications of the ACM 29(3), 1986).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from tpme.reports.data.tpme import COLUMNS, Weights

RATIOS = ("time_ratio", "parameters_ratio", "memory_ratio")
"""Of T, P and M, in this order."""
DEFAULT_REFERENCES = ("fft", "full-finetuning")
"""Labels of full fine-tuning, here and in what peft's maintainers publish."""


def reference_row(summary: pd.DataFrame, named: str | None) -> str | None:
    """The first row, or the first of that label, which is ``named`` (by default full fine-tuning); None without one.

    Only a row that finished counts.
    """
    usable = summary[(summary["status"] == "ok") & summary[list(COLUMNS)].notna().all(axis=1)]
    for wanted in (named,) if named else DEFAULT_REFERENCES:
        matching = usable.index == wanted
        matching = matching if matching.any() else (usable["label"] == wanted).to_numpy()
        if matching.any():
            return str(usable.index[matching][0])
    return None


def cost_ratios(summary: pd.DataFrame, reference: str | None, weights: Weights) -> pd.DataFrame:
    """``RATIOS`` and ``cost_ratio`` of every row; NaN where a cost, or the reference, is missing."""
    costs = summary[list(COLUMNS)].astype(float)
    base = costs.loc[reference] if reference is not None else np.nan
    ratios = (costs / base).set_axis(list(RATIOS), axis=1)
    with np.errstate(divide="ignore"):  # a row that trains nothing has no cost on this scale, but 0
        logs = np.log(ratios)
    weighted = sum(
        (weight * logs[name] for name, weight in zip(RATIOS, weights.values, strict=True) if weight),
        start=pd.Series(0.0, index=summary.index),
    )
    return ratios.assign(cost_ratio=np.exp(weighted))
