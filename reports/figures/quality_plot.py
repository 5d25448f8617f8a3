"""The figure of quality against TPME."""

from __future__ import annotations

import itertools
import textwrap
from typing import Any

import numpy as np
import pandas as pd

from tpme.reports.data.qualities import worst_first
from tpme.reports.data.section import Section
from tpme.reports.data.tpme import pareto
from tpme.reports.figures.labels import place_labels
from tpme.reports.figures.style import (
    COLUMN_INCHES,
    DASHES,
    GREY,
    INK,
    PAGE_INCHES,
    SILVER,
    Plot,
    margins,
    new_figure,
    row_label,
    text_width,
)

WIDE_FROM = 12
"""Number of rows from which the figure is as wide as a page: their names need the room."""
LABELLED = 40
"""Number of rows up to which the figure has its usual height; beyond, names of the front find their places first."""


def quality_tpme(section: Section) -> Plot | None:
    """The main quality against TPME with the intervals of both; rows that no other beats in both are marked.

    None for fewer than two rows.
    """
    if section.main is None:
        return None
    summary, key, name_of = section.summary, section.main.key, section.main.header
    rows = summary[summary["tpme"].notna() & summary[key].notna()]
    if len(rows) < 2:
        return None
    wide = len(rows) >= WIDE_FROM
    crowded = len(rows) > LABELLED
    tall = 6.4 if crowded else 4.2
    figure = new_figure(PAGE_INCHES if wide else COLUMN_INCHES, tall if wide else 3.0 + 0.04 * len(rows))
    axes = figure.add_subplot()
    x, y = 100 * rows["tpme"], rows[key]
    front = pareto(rows.assign(good=worst_first(y, section.main)), quality="good")
    up = [rows[f"{key}_{end}"].fillna(y) for end in ("low", "high")]
    across = [(100 * rows[name]).fillna(x) for name in ("tpme_low", "tpme_high")]
    axes.vlines(x, *up, color=SILVER, lw=0.6, zorder=1)
    axes.hlines(y, *across, color=SILVER, lw=0.6, zorder=1)
    best = rows[front].sort_values("tpme")
    corners = np.repeat(np.column_stack([100 * best["tpme"], best[key]]), 2, axis=0)
    steps = np.column_stack([corners[1:, 0], corners[:-1, 1]])
    axes.plot(*steps.T, color=INK, lw=0.8, zorder=2)
    axes.plot(x[front], y[front], "D", ms=4, color=INK, mew=0, zorder=3, label="no row is better in both")
    axes.plot(x[~front], y[~front], "o", ms=3.5, mfc="white", mec=INK, mew=0.9, zorder=3, label="some row is")
    axes.set_ylabel(f"{name_of}, {section.main.better} is better")
    axes.margins(x=0.08 if wide else 0.12, y=0.1)
    rest = summary[summary["tpme"].isna() & summary[key].notna()]
    beside, far = _references(rest, rows, key)
    right = _draw_references(section, axes, beside)
    off_scale = [f"{row_label(section, str(name))} {value:.3f}" for name, value in far.items()]
    below = textwrap.wrap(f"off the scale: {', '.join(off_scale)}" if off_scale else "", 120 if wide else 60)
    axes.set_xlabel("\n".join(["TPME (%), lower is better", *below]))
    margins(figure, 0.55, 0.05 + right, 0.36 + 0.12 * len(below), 0.28)
    figure.legend(loc="upper left", ncols=2, frameon=False, fontsize=6, handletextpad=0.2, borderaxespad=0.2)
    ends = axes.get_xlim()
    labels = [row_label(section, str(name)) for name in rows.index]
    unplaced = place_labels(
        axes,
        np.column_stack([x, y]),
        labels,
        first=np.flatnonzero(front.to_numpy() | (rows.index == section.reference)).tolist() if crowded else (),
        lines=[*itertools.pairwise(steps), *(((ends[0], y), (ends[1], y)) for y in beside)],
        bars=[
            *zip(np.column_stack([x, up[0]]), np.column_stack([x, up[1]]), strict=True),
            *zip(np.column_stack([across[0], y]), np.column_stack([across[1], y]), strict=True),
        ],
    )
    good = "Up" if section.main.better == "higher" else "Down"
    caption = (
        f"{name_of} against TPME, a cost in percent: 0 is as cheap as the cheapest of these {len(rows)} rows in time, "
        f"parameters and memory, 100 as dear as the dearest. {good} and left is better. Bars: 95 % intervals"
        f"{'' if section.ranked else ' of TPME'}."
    )
    if len(beside):
        caption += " Broken lines: rows without a TPME, named on the right."
    if len(far):
        caption += " Those far from the others are named at the foot."
    if unplaced:
        caption += f" No room for {', '.join(unplaced)}."
    doubts = (text if text.endswith(".") else f"{text}." for text in section.notes.doubts)
    return Plot("quality-tpme", "Quality against TPME", " ".join([caption, *doubts]), figure)


# --- parts ---------------------------------------------------------------------------------------------------


def _references(rest: pd.DataFrame, rows: pd.DataFrame, key: str) -> tuple[pd.Series[float], pd.Series[float]]:
    """The quality of rows without a TPME, ascending: those that fit on the axis of the others, and the rest."""
    low, high = (rows[f"{key}_{end}"].fillna(rows[key]) for end in ("low", "high"))
    low, high = low.min(), high.max()
    values = rest[key].sort_values()
    near = values.between(low - (high - low) / 2, high + (high - low) / 2)
    return values[near], values[~near]


def _draw_references(section: Section, axes: Any, values: pd.Series[float]) -> float:
    """A line for each value, each with its own dashes, and its row's name on the right. Returns the names' width.

    A name that had to move away from its neighbour keeps a line to its own. The width is in inches.
    """
    low, high = axes.get_ylim()
    low, high = min([low, *values]), max([high, *values])
    axes.set_ylim(low - 0.04 * (high - low), high)
    least = 0.04 * (high - low)  # a line of text
    names = [row_label(section, str(name)) for name in values.index]
    for place, (name, value, y) in enumerate(zip(names, values, _apart(list(values), least), strict=True)):
        dashes = DASHES[1 + place % (len(DASHES) - 1)]
        axes.axhline(value, color=GREY, lw=0.7, ls=dashes, zorder=0)
        axes.annotate(
            name, (1, value), xytext=(1.02, y), xycoords=axes.get_yaxis_transform(), fontsize=6, color=GREY,
            textcoords=axes.get_yaxis_transform(), va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip
    return text_width(axes.figure, names, 6) + (0.08 if names else 0)


def _apart(values: list[float], least: float) -> list[float]:
    """Ascending values, moved up until neighbours are at least ``least`` apart."""
    spread: list[float] = []
    for value in values:
        spread.append(max(value, spread[-1] + least) if spread else value)
    return spread
