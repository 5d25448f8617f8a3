"""Figures of shares: of wall time by phase, of TPME's weights by who wins there, of ranks by who holds them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from tpme.reports.figure import Plot, row_label
from tpme.reports.load import Array
from tpme.reports.resampling import DRAWS, LEVEL
from tpme.reports.section import Section
from tpme.reports.style import BLUE, COLOURS, COLUMN_INCHES, PALE, SILVER, margins, new_figure, text_width
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


def ranks(section: Section) -> Plot | None:
    """How often every row holds every rank by TPME when epochs and seeds are resampled; None for a single row."""
    resampled = section.resampled
    if resampled is None or len(resampled.rows) < 2:
        return None
    count, share = len(resampled.rows), 100 * resampled.rank_shares()
    names = [row_label(section, name) for name in resampled.rows]
    left, right, top = 0.12, 0.42, 0.3
    figure = new_figure(COLUMN_INCHES, 0.38 + top + 0.15 * count)
    axes = figure.add_subplot()
    left += text_width(figure, names, 6.5)
    margins(figure, left, right, 0.38, top)
    edges = np.arange(count + 1) + 0.5
    shades = LinearSegmentedColormap.from_list("share", ["white", BLUE])
    drawn = axes.pcolormesh(edges, edges, share, cmap=shades, vmin=0, vmax=100, edgecolors=PALE, linewidth=0.3)
    if (COLUMN_INCHES - left - right) / count > 0.18:  # else the numbers would not fit
        for row, column in np.argwhere(share >= 0.5):
            told, colour = f"{share[row, column]:.0f}", "white" if share[row, column] > 90 else "black"
            axes.text(column + 1, row + 1, told, fontsize=5.5, ha="center", va="center", color=colour)
    beside: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "fontsize": 6, "annotation_clip": False}
    axes.annotate(f"{100 * LEVEL:.0f} %", (count + 0.5, 0.5), va="bottom", **beside)
    for place, name in enumerate(resampled.rows, start=1):
        held = "–".join(dict.fromkeys(map(str, resampled.rank_interval(name))))
        axes.annotate(held, (count + 0.5, place), va="center", **beside)
    axes.set_yticks(np.arange(1, count + 1), names)
    axes.set_xticks([rank for rank in range(1, count + 1) if count <= 12 or rank == 1 or rank % 5 == 0])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xlabel("rank by TPME (1 is best)")
    height = figure.get_figheight()
    scale = figure.add_axes((left / COLUMN_INCHES, 1 - 0.1 / height, 0.7 / COLUMN_INCHES, 0.06 / height))
    figure.colorbar(drawn, cax=scale, orientation="horizontal", ticks=[])
    figure.text((left + 0.75) / COLUMN_INCHES, 1 - 0.07 / height, "0 to 100 % of the draws", fontsize=6, va="center")
    seeds = section.summary.loc[list(resampled.rows), "seeds_ok"]
    what = "epochs (one seed a row)" if (seeds == 1).all() else "seeds and epochs"
    caption = (
        f"How often each row holds each rank by TPME in {DRAWS:,} resamplings of {what}; on the right the ranks it "
        f"holds in {100 * LEVEL:.0f} % of them."
    )
    return Plot("ranks", "TPME rank under resampling", caption, figure)


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
