"""The figure of inference: which method is cheap to serve, and how good it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from tpme.bench.quantities import Quantity, number, quantity
from tpme.reports.data.load import Array
from tpme.reports.data.section import Section
from tpme.reports.data.serving import facts_of, inference_costs, served
from tpme.reports.figures.bars import bars
from tpme.reports.figures.style import (
    GREY,
    INK,
    PAGE_INCHES,
    Plot,
    name_rows,
    new_figure,
    row_label,
)

FLOPS, RATE = "inference_flops", "inference_items_per_s"


def inference(section: Section) -> Plot | None:
    """The main quality, FLOPs an item and items a second of every row that measured inference, side by side."""
    rows = served(section.behind)
    if not rows or section.main is None:
        return None
    frame = inference_costs(section.behind)
    figure = new_figure(PAGE_INCHES, 0.45 + 0.17 * len(frame))
    quality, flops, rate = figure.subplots(1, 3, sharey=True, width_ratios=(0.9, 1, 1))
    names = [row_label(section, str(name)) for name in frame.index]
    position = name_rows(figure, quality, names, right=0.12, across=0.3, bottom=0.22)
    _dots(quality, position, section.summary.loc[frame.index], section.main)
    logarithmic = []
    for axes, key in ((flops, FLOPS), (rate, RATE)):
        what = quantity(key)
        unit, scale = what.scale(frame[key])
        quartiles = frame[[f"{RATE}_low", f"{RATE}_high"]].to_numpy().T / scale if key == RATE else None
        title = f"{unit}/item" if key == FLOPS else "items/s"
        texts = [_short(value / scale) for value in frame[key]]
        logarithmic += [title] if bars(axes, position, frame[key] / scale, texts, reach=quartiles) else []
        axes.set_title(f"{title} {'↓' if what.better == 'lower' else '↑'}", pad=3)
    over = " with 95 % intervals over users" if section.ranked else ""
    size = max(facts_of(seed).batch.size for seeds in rows.values() for seed in seeds)
    caption = (
        f"{section.main.header}{over}, FLOPs of encoding an item, and items encoded a second, "
        f"{size} at a time: median with quartiles of the runs. Cheap to serve: few FLOPs, many items."
    )
    given = [name for name, seeds in rows.items() if any(facts_of(seed).looked_up for seed in seeds)]
    if given:
        caption += f" Without encoders, from a table of hidden states: {', '.join(given)}."
    if logarithmic:
        caption += f" Dots in place of bars: the axis is logarithmic ({', '.join(logarithmic)})."
    return Plot("inference", "Quality and cost of inference", caption, figure)


def _short(value: float) -> str:
    """A number in the width of a bar's text: 60000 is 60.0k."""
    size, letter = next(((size, letter) for size, letter in ((1e6, "M"), (1e3, "k")) if value >= size), (1.0, ""))
    return f"{number(value / size)}{letter}"


def _dots(axes: Any, position: Array, summary: pd.DataFrame, what: Quantity) -> None:
    """A quality of every row with its interval, where it has one."""
    value, low, high = (summary[f"{what.key}{end}"].to_numpy(dtype=np.float64) for end in ("", "_low", "_high"))
    axes.hlines(position, low, high, color=GREY, lw=0.8)
    axes.plot(value, position, "o", ms=3, color=INK, clip_on=False)
    axes.set_title(f"{what.header} {'↓' if what.better == 'lower' else '↑'}", pad=3)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.grid(False, axis="y")
