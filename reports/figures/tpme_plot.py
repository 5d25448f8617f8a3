"""The figure of TPME: a line for every row with its interval, its rank and what it costs beside the reference row."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpme.bench.quantities import number
from tpme.reports.data.section import Section
from tpme.reports.data.stats import LEVEL
from tpme.reports.figures.style import (
    COLUMN_INCHES,
    GREY,
    INK,
    Plot,
    name_rows,
    new_figure,
    row_label,
)
from tpme.reports.figures.weight_plot import NEARLY_ALL, winner

LONG_NAME = 6
"""Characters of a reference row from which its column needs more room."""
REFERENCE = 10
"""Characters of a reference row for which there is room above its column."""
BAND = "#EDEFF2"
"""Behind rows that share a rank."""


def tpme_intervals(section: Section) -> Plot | None:
    """TPME of every row as a dot on its interval, best first, with its rank. None for fewer than two rows.

    Rows that share a rank lie on one grey band. A row that is an end of the scale has no interval and an open dot.
    """
    names = section.compared
    if section.resampled is None or len(names) < 2:
        return None
    rows = section.summary.loc[names]
    ratios = section.reference is not None
    figure = new_figure(COLUMN_INCHES, 0.72 + 0.155 * len(rows))
    axes = figure.add_subplot()
    labels = [row_label(section, name) for name in names]
    room = 1.05 if len(str(section.reference)) < LONG_NAME else 1.3
    position = name_rows(figure, axes, labels, right=room if ratios else 0.72, bottom=0.42, top=0.3)
    ranks = rows["tpme_rank"]
    for rank in ranks[ranks.duplicated()].unique():
        tied = position[(ranks == rank).to_numpy()]
        axes.axhspan(tied.min() - 0.45, tied.max() + 0.45, color=BAND, lw=0, zorder=0)
    value, low, high = (100 * rows[name].to_numpy(dtype=np.float64) for name in ("tpme", "tpme_low", "tpme_high"))
    end = rows["tpme_end"].to_numpy(dtype=bool)
    axes.hlines(position, low, high, color=INK, lw=1.2)
    for bound in (low, high):
        axes.plot(bound, position, "|", color=INK, ms=4, mew=0.8)
    axes.plot(value[~end], position[~end], "o", ms=3.6, color=INK, mew=0)
    axes.plot(value[end], position[end], "o", ms=3.8, mfc="white", mec=INK, mew=0.9)
    axes.grid(False, axis="y")
    axes.margins(x=0.04)
    axes.set_xlabel("TPME (%): 0 as cheap as the cheapest row,\n100 as dear as the dearest", labelpad=2)
    several = ranks.duplicated(keep=False)
    texts = [f"{rank:.0f}{' =' if tied else ''}" for rank, tied in zip(ranks, several, strict=True)]
    _write(axes, position, "rank", texts, 5)
    held = ("–".join(dict.fromkeys(map(str, section.resampled.rank_interval(name)))) for name in names)
    _write(axes, position, f"in\n{100 * LEVEL:.0f} %", list(held), 27)
    if ratios:
        texts = [number(ratio, 2) for ratio in rows["cost_ratio"]]
        _write(axes, position, f"cost,\n× {_short(str(section.reference))}", texts, 52)
    return Plot("tpme", "TPME with intervals", _caption(section, ratios), figure)


def _short(name: str) -> str:
    return name if len(name) <= REFERENCE else f"{name[: REFERENCE - 1]}…"


def _write(axes: Any, position: Any, title: str, texts: list[str], offset: float) -> None:
    """A column of texts on the right of the axes, ``offset`` points from them."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    look: dict[str, Any] = {"fontsize": 6, "annotation_clip": False, "linespacing": 1.0}
    axes.annotate(title, (1, position[0] + 0.6), xytext=(offset, 0), va="bottom", color=GREY, **place, **look)
    for y, text in zip(position, texts, strict=True):
        axes.annotate(text, (1, y), xytext=(offset, 0), va="center_baseline", **place, **look)


def _caption(section: Section, ratios: bool) -> str:
    weights, time = section.weights, "epoch time" if section.ranked else "time"
    rows = section.summary.loc[section.compared]
    scale = f"the rows of {section.frame_from}" if section.frame_from else f"these {len(rows)} rows"
    parts = [
        f"TPME places every row between the cheapest (0 %) and the dearest (100 %) of {scale} in {time}, trainable "
        f"parameters and training memory, weighted {100 * weights.time:g}, {100 * weights.parameters:g} and "
        f"{100 * weights.memory:g} %" + ("." if section.frame_from else "; other rows would move it."),
        f"Bars: {100 * LEVEL:.0f} % intervals over resamplings of seeds and {section.parts}; on the right each "
        "row's rank, and the ranks it has in as many of the resamplings.",
    ]
    if rows["tpme_end"].any():
        parts.append("Open dots have none: the row is an end of the scale in every resampling.")
    if section.ties:
        parts.append("Rows of one rank (=, grey band) are tied within noise.")
    parts.append(f"Noise: {section.noise.text}.")
    if ratios:
        parts.append(
            f"On the right the cost as a multiple of {section.reference} (weighted geometric mean of the ratios of "
            "time, parameters and memory), which no other row can move."
        )
    most = winner(section)
    if most is not None and most[1] >= NEARLY_ALL:
        parts.append(f"{most[0]} has the lowest TPME under {int(100 * most[1])} % of all weights.")
    return " ".join(parts)
