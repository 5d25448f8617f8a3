"""Horizontal bars with their values written behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tpme.reports.data.load import Array
from tpme.reports.figures.style import LOG_FROM, log_axis


def bars(
    axes: Any,
    position: Array,
    values: pd.Series[float],
    texts: Sequence[str],
    colour: str,
    *,
    lower_bound: Array | None = None,
    quartiles: Array | None = None,
) -> bool:
    """Draw a bar for each value, with its text behind it. Returns whether the axis is logarithmic.

    Args:
        axes: of the panel.
        position: of the bars, from the top down.
        values: their lengths; NaN for none.
        texts: one for each bar.
        colour: of all bars.
        lower_bound: whether the value is at least this much, for each bar: hatched.
        quartiles: shape ``(2, bars)``, a thin line on each bar.
    """
    positive = values[values > 0]
    logarithmic = len(positive) > 1 and positive.max() > LOG_FROM * positive.min()
    top = positive.max() if len(positive) else 1.0
    start = 0.6 * positive.min() if logarithmic else 0.0
    if logarithmic:
        log_axis(axes, start, start * (top / start) ** 1.55)
    else:
        axes.set_xlim(0, 1.55 * top)
        axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ends = values.where(values > 0, start).to_numpy(dtype=np.float64)
    drawn = axes.barh(position, ends - start, left=start, height=0.68, color=colour, lw=0)
    for index in np.flatnonzero(lower_bound) if lower_bound is not None else ():
        drawn[index].set(hatch="/////", fill=False, edgecolor=colour, linewidth=0.5)
    if quartiles is not None:
        axes.hlines(position, *quartiles, color="black", lw=0.6, zorder=4)
        ends = np.fmax(ends, quartiles[1])
    for y, end, text in zip(position, ends, texts, strict=True):
        axes.annotate(
            text, (end, y), xytext=(1.8, 0), textcoords="offset points", fontsize=5.5, va="center",
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.4},
        )  # fmt: skip
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return logarithmic
