"""Axes that several figures have: a row of text for every bar, and logarithmic ones with few ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tpme.reports.data.load import Array
from tpme.reports.figures.style import margins, text_width

LOG_FROM = 20
"""An axis is logarithmic where the largest value is so many times the smallest."""


def name_rows(
    figure: Figure,
    axes: Any,
    names: Sequence[str],
    *,
    right: float = 0.05,
    bottom: float = 0.36,
    top: float = 0.2,
    across: float = 0,
) -> Array:
    """Names on the left of horizontal bars, with the room they need. Returns where the bars go, from the top down.

    The other lengths are the room around the axes and between panels, in inches.
    """
    position = np.arange(len(names), dtype=np.float64)[::-1]
    axes.set_yticks(position, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    margins(figure, text_width(figure, names, 6.5) + 0.12, right, bottom, top, across=across)
    return position


def log_axis(axes: Any, low: float, high: float, most: int = 3) -> None:
    """A logarithmic x axis from ``low`` to ``high`` with at most so many ticks."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_round_values(low, high, most)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _round_values(low: float, high: float, most: int) -> list[float]:
    """As many as fit: 1, 2 and 5 or 1 and 3 of every power of ten, each power, or every n-th, 1 among them."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        values = [digit * 10.0**power for power in powers for digit in digits]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= most:
            return inside
    stride = math.ceil(len(inside) / most)
    return [value for value in inside if round(math.log10(value)) % stride == 0]


def _power(value: float) -> str:
    """0.01 to 1000 as they are, what is beyond as a short power of ten."""
    if 0.0099 <= value <= 5000:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**power)
    raised = "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return raised if digit == 1 else f"{digit}·{raised}"
