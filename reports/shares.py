"""Figures of parts of a whole: the wall time of a cell by phase, and the weights of TPME by the row that wins there."""

from __future__ import annotations

import math

import numpy as np

from tpme.reports.figure import Plot, row_label
from tpme.reports.load import Array
from tpme.reports.section import Section
from tpme.reports.style import COLOURS, COLUMN_INCHES, SILVER, margins, new_figure, text_width
from tpme.reports.tables import phases as phase_table
from tpme.reports.tpme import COLUMNS

KINDS = 6
"""So many phases get a colour of their own, the longest; the rest are one."""


def phases(section: Section) -> Plot | None:
    """Wall time of a cell of every row, stacked by phase as a share of the whole."""
    table = phase_table(section)
    kinds = [index for index in table.shown if table.columns[index].numeric and table.columns[index].key != "wall_s"]
    if not table.rows or not kinds:
        return None
    seconds = np.array([[float(row[index].value or 0) for index in kinds] for row in table.rows])
    total = seconds.sum(axis=1, keepdims=True)
    share = 100 * np.divide(seconds, total, out=np.zeros_like(seconds), where=total > 0)
    order = np.argsort(-share.sum(axis=0), kind="stable")
    titles = [table.columns[kinds[place]].header for place in order[:KINDS]] + ["all else"]
    share = np.column_stack([share[:, order[:KINDS]], share[:, order[KINDS:]].sum(axis=1)])
    names = [row_label(section, str(row[0].value)) for row in table.rows]
    lines = math.ceil(len(titles) / 4)
    figure = new_figure(COLUMN_INCHES, 0.5 + 0.17 * len(names) + 0.13 * lines)
    axes = figure.add_subplot()
    position, left = np.arange(len(names))[::-1], np.zeros(len(names))
    for colour, title, width in zip((*COLOURS[: len(titles) - 1], SILVER), titles, share.T, strict=True):
        axes.barh(position, width, left=left, height=0.7, color=colour, lw=0.3, edgecolor="white", label=title)
        left += width
    axes.set_yticks(position, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("share of the cell's wall time (%)")
    margins(figure, text_width(figure, names, 6.5) + 0.12, 0.12, 0.36, 0.1 + 0.13 * lines)
    figure.legend(loc="upper center", ncols=4, frameon=False, fontsize=6, handlelength=1, columnspacing=1)
    caption = "Where the wall time of a cell goes, mean over the seeds."
    return Plot("phases", "Wall time by phase", caption, figure)


def weights(section: Section) -> Plot | None:
    """The simplex of TPME's weights, each point in the colour of the row with the lowest TPME there."""
    frame, rows = section.frame, section.compared
    if frame is None or len(rows) < 2:
        return None
    costs = section.summary.loc[rows, list(COLUMNS)].to_numpy(dtype=np.float64)
    low = np.array([getattr(frame, name).min for name in COLUMNS])
    span = np.array([getattr(frame, name).max for name in COLUMNS]) - low
    terms = np.divide(costs - low, span, out=np.zeros_like(costs), where=span > 0)
    distinct = sorted(np.unique(terms.round(12), axis=0, return_index=True)[1])  # of equals the first
    regions = {row: _won(terms[row], terms[[other for other in distinct if other != row]]) for row in distinct}
    share = {row: _area(_flat(corners)) / _area(_flat(np.eye(3))) for row, corners in regions.items() if len(corners)}
    ranked = sorted((row for row in share if share[row] > 1e-9), key=lambda row: (-round(share[row], 9), row))
    lines = math.ceil(len(ranked) / 2)
    height = 2.95 + 0.14 * lines
    figure = new_figure(COLUMN_INCHES, height)
    axes = figure.add_axes((0.12, (0.25 + 0.14 * lines) / height, 0.76, 2.5 / height))
    for colour, row in zip(COLOURS * math.ceil(len(ranked) / len(COLOURS)), ranked, strict=False):
        told = f"{100 * share[row]:.0f}" if share[row] >= 0.01 else "< 1"
        label = f"{row_label(section, rows[row])} ({told} %)"
        axes.fill(*_flat(regions[row]).T, facecolor=colour, edgecolor="white", lw=0.6, label=label)
    chosen = _flat(np.array([section.weights.values]))[0]
    axes.plot(*chosen, "o", ms=5, mfc="white", mec="black", mew=0.8)
    for point, text, down in zip(
        _flat(np.eye(3)), ("time T", "parameters P", "memory M"), (True, True, False), strict=True
    ):
        axes.annotate(
            f"only {text}", point, xytext=(0, -3 if down else 3), textcoords="offset points", ha="center",
            va="top" if down else "bottom", fontsize=6.5, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, math.sqrt(0.75) + 0.02)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.legend(loc="lower center", ncols=2, frameon=False, fontsize=6, handlelength=1)
    caption = (
        "Which row has the lowest TPME for every choice of weights; a corner counts one cost alone, the circle is this "
        "report's choice. In brackets the share of all choices that a row wins."
    )
    return Plot("weights", "Which row wins under which weights", caption, figure)


def _flat(weights: Array) -> Array:
    """Weights of T, P and M, shape ``(..., 3)``, as points of a triangle: T left, P right, M above."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    return np.asarray(weights @ corners)


def _won(own: Array, others: Array) -> Array:
    """Where a row has the lowest TPME: corners of a convex polygon, shape ``(corners, 3 weights)``, maybe none.

    The simplex, cut by one plane for each other row (Sutherland and Hodgman's clipping): TPME is linear in the weights.
    """
    corners = list(np.eye(3))
    for other in others:
        ahead = [float((other - own) @ corner) for corner in corners]
        kept = []
        for index, corner in enumerate(corners):
            before, lead = corners[index - 1], ahead[index - 1]
            if (lead < 0) != (ahead[index] < 0):
                kept.append(before + (corner - before) * lead / (lead - ahead[index]))
            if ahead[index] >= 0:
                kept.append(corner)
        corners = kept
    return np.array(corners)


def _area(points: Array) -> float:
    """Area of a polygon, shape ``(corners, 2)``: the shoelace formula."""
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
