"""Horizontal bars, or dots where the axis is logarithmic, with their values written behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tpme.reports.data.load import Array
from tpme.reports.figures.style import INK, log_axis

LOG_FROM = 100
"""The axis is logarithmic where the longest bar would be more than this many times the shortest; values are written."""


def bars(
    axes: Any,
    position: Array,
    values: pd.Series[float],
    texts: Sequence[str],
    *,
    lower_bound: Array | None = None,
    reach: Array | None = None,
    room: float = 1.55,
) -> bool:
    """Draw each value with its text behind it. Returns whether the axis is logarithmic.

    A logarithmic axis has no 0 at which bars could begin, and their lengths would say nothing: it has dots.

    Args:
        axes: of the panel.
        position: of the bars, from the top down.
        values: their lengths; NaN for none.
        texts: one for each bar.
        lower_bound: whether the value is at least this much, for each bar: hatched, or an arrow to the right.
        reach: lower and upper end of an error bar on each bar, shape ``(2, bars)``; NaN for none.
        room: length of the axis as a multiple of the longest bar, for the texts.
    """
    low, high = np.full((2, len(values)), np.nan) if reach is None else reach
    ends = np.fmax(values.to_numpy(dtype=np.float64), high)
    positive = values[values > 0]
    logarithmic = len(positive) > 1 and positive.max() > LOG_FROM * positive.min()
    least = np.zeros(len(values), dtype=bool) if lower_bound is None else lower_bound
    start = 0.0
    if logarithmic:
        start = 0.6 * positive.min()
        log_axis(axes, start, start * (np.nanmax(ends) / start) ** room)
        for marker, chosen in (("o", ~least), (">", least)):
            axes.plot(values[chosen], position[chosen], marker, ms=3.2, color=INK, mew=0)
        axes.grid(True, axis="y")
    else:
        axes.set_xlim(0, room * (np.nanmax(ends) if len(positive) else 1.0))
        axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        drawn = axes.barh(position, values.fillna(0), height=0.62, color=INK, alpha=0.75, lw=0)
        for index in np.flatnonzero(least):
            drawn[index].set(hatch="/////", fill=False, edgecolor=INK, linewidth=0.5)
        axes.grid(False, axis="y")
    low = np.where(low < start, start, low)
    axes.hlines(position, low, high, color="black", lw=1.0, zorder=1.5 if logarithmic else 4)
    for end in () if logarithmic else (low, high):  # a short interval would be all caps beside its dot
        axes.plot(end, position, "|", color="black", ms=4, mew=0.7, zorder=4)
    for y, end, text in zip(position, np.where(ends > start, ends, start), texts, strict=True):
        axes.annotate(
            text, (end, y), xytext=(3, 0), textcoords="offset points", fontsize=5.5, va="center",
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.4},
        )  # fmt: skip
    axes.tick_params(axis="y", length=0)
    return logarithmic
