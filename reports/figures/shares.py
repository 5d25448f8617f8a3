"""Figures of shares: wall time by phase, TPME's weights by winning row, and ranks under resampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tpme.reports.data.load import Array
from tpme.reports.data.phase_times import phase_shares
from tpme.reports.data.resampling import DRAWS
from tpme.reports.data.section import Section
from tpme.reports.data.stats import LEVEL
from tpme.reports.data.tpme import COLUMNS
from tpme.reports.figures.labels import halo
from tpme.reports.figures.style import (
    BLUE,
    COLOURS,
    COLUMN_INCHES,
    PALE,
    SILVER,
    Plot,
    margins,
    name_rows,
    new_figure,
    row_label,
    text_width,
)

KINDS = 6
"""Number of phases, the longest, that get their own colours; the rest share one."""
WINNERS, LEAST_SHARE = 12, 0.01
"""Number of winners that the simplex tells apart, and the share of it that each must have."""


def phases(section: Section) -> Plot | None:
    """Wall time of a cell of every row by phase, in stacked shares."""
    share = phase_shares(section)
    if share.empty:
        return None
    colours = phase_colours(section)
    lines = math.ceil(len(set(colours.values())) / 4)
    figure = new_figure(COLUMN_INCHES, 0.5 + 0.17 * len(share) + 0.13 * lines)
    axes = figure.add_subplot()
    names = [row_label(section, str(name)) for name in share.index]
    position = name_rows(figure, axes, names, right=0.12, top=0.1 + 0.13 * lines)
    left = np.zeros(len(share))
    for colour, width in share.T.groupby(list(colours.values()), sort=False).sum().iterrows():
        axes.barh(position, width, left=left, height=0.7, color=colour, lw=0.3, edgecolor="white")
        left += width.to_numpy()
    axes.set_xlim(0, 100)
    axes.grid(False, axis="y")
    axes.set_xlabel("share of the cell's wall time (%)")
    phase_legend(figure, colours)
    caption = "Where the wall time of a cell goes, mean over the seeds."
    return Plot("phases", "Wall time by phase", caption, figure)


def phase_colours(section: Section) -> dict[str, str]:
    """The colour of every kind of phase in all figures of a section; short phases share one."""
    kinds = list(phase_shares(section).columns)
    return dict(zip(kinds, [*COLOURS[:KINDS], *[SILVER] * len(kinds)], strict=False))


def phase_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """The legend of the phases at the top of a figure, four in a line."""
    rest = [kind for kind, colour in colours.items() if colour == SILVER]
    entries = [Patch(color=colour, label=kind) for kind, colour in colours.items() if colour != SILVER]
    if rest:
        entries.append(Patch(color=SILVER, label=rest[0] if len(rest) == 1 else "all else"))
    by_line = [entry for column in range(4) for entry in entries[column::4]]  # legends fill column by column
    figure.legend(
        handles=by_line, loc="upper center", ncols=4, frameon=False, fontsize=6, handlelength=1, columnspacing=1,
        borderaxespad=0.2,
    )  # fmt: skip


def weights(section: Section) -> Plot | None:
    """The simplex of TPME's weights, divided among the rows that have the lowest TPME somewhere.

    The largest regions have a number and a colour, with hatching from the eighth on, and differ even in greyscale.
    Regions too small to see share one grey.
    """
    frame, rows = section.frame, section.compared
    if frame is None or len(rows) < 2:
        return None
    regions, share = _regions(section)
    named = [row for row in regions if share[row] >= LEAST_SHARE][:WINNERS]
    rest = [row for row in regions if row not in named]
    lines = math.ceil((len(named) + bool(rest)) / 2)
    height = 2.68 + 0.14 * lines
    figure = new_figure(COLUMN_INCHES, height)
    axes = figure.add_axes((0.11, (0.16 + 0.14 * lines) / height, 0.76, 2.32 / height))
    chosen = _flat(np.array([section.weights.values]))[0]
    written = [chosen]
    for place, row in enumerate(named):
        label = f"{place + 1}  {row_label(section, rows[row])} ({_percent(share[row])})"
        look = {"facecolor": COLOURS[place % len(COLOURS)], "hatch": None if place < len(COLOURS) else "//////"}
        axes.fill(*regions[row].T, edgecolor="white", lw=0.6, label=label, **look)
        spot, room = _roomiest(regions[row], written)
        if room > 0.01:
            axes.text(spot[0], spot[1], str(place + 1), fontsize=6.5, ha="center", va="center", path_effects=halo())
            written.append(spot)
    for row in rest:
        name = row_label(section, rows[row]) if len(rest) == 1 else f"{len(rest)} others"
        label = f"{name} ({_percent(sum(share[row] for row in rest))})"
        axes.fill(*regions[row].T, facecolor=SILVER, lw=0, label=label if row == rest[0] else None)
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
    figure.legend(loc="lower center", ncols=2, frameon=False, fontsize=6, handlelength=1.4, borderaxespad=0.2)
    caption = (
        "Which row has the lowest TPME for every choice of weights; a corner counts one cost alone, the circle is this "
        "report's choice. In brackets the share of all choices that a row wins."
    )
    return Plot("weights", "Which row wins under which weights", caption, figure)


def ranks(section: Section) -> Plot | None:
    """How often each row has each rank by TPME when epochs and seeds are resampled; None for a single row."""
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
    if (COLUMN_INCHES - left - right) / count > 0.18:  # the numbers fit
        for row, column in np.argwhere(share >= 0.5):
            text, colour = f"{share[row, column]:.0f}", "white" if share[row, column] > 90 else "black"
            axes.text(column + 1, row + 1, text, fontsize=5.5, ha="center", va="center", color=colour)
    beside: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "fontsize": 6, "annotation_clip": False}
    axes.annotate(f"{100 * LEVEL:.0f} %", (count + 0.5, 0.5), va="bottom", **beside)
    for place, name in enumerate(resampled.rows, start=1):
        held = "–".join(dict.fromkeys(map(str, resampled.rank_interval(name))))
        axes.annotate(held, (count + 0.5, place), va="center_baseline", **beside)
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


def _regions(section: Section) -> tuple[dict[int, Array], dict[int, float]]:
    """Where each row of ``compared`` has the lowest TPME: polygons in the plane, largest first, and their shares."""
    costs = section.summary.loc[section.compared, list(COLUMNS)].to_numpy(dtype=np.float64)
    low = np.array([getattr(section.frame, name).min for name in COLUMNS])
    span = np.array([getattr(section.frame, name).max for name in COLUMNS]) - low
    terms = np.divide(costs - low, span, out=np.zeros_like(costs), where=span > 0)
    distinct = sorted(np.unique(terms.round(12), axis=0, return_index=True)[1])  # the first of equal rows
    won = {int(row): _won(terms[row], terms[[other for other in distinct if other != row]]) for row in distinct}
    regions = {row: _flat(corners) for row, corners in won.items() if len(corners)}
    share = {row: _area(region) / _area(_flat(np.eye(3))) for row, region in regions.items()}
    ranked = sorted((row for row in share if share[row] > 1e-9), key=lambda row: (-round(share[row], 9), row))
    return {row: regions[row] for row in ranked}, share


def _percent(share: float) -> str:
    if share < LEAST_SHARE:
        return "< 1 %"
    return "> 99 %" if 0.99 < share < 1 - 1e-9 else f"{100 * share:.0f} %"


def _flat(weights: Array) -> Array:
    """Weights of T, P and M, shape ``(..., 3)``, as points of a triangle: T left, P right, M above."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    return np.asarray(weights @ corners)


def _won(own: Array, others: Array) -> Array:
    """Where a row has the lowest TPME: corners of a convex polygon, shape ``(corners, 3 weights)``, possibly none.

    TPME is linear in the weights, so each other row cuts the simplex by a plane (Sutherland and Hodgman's clipping).
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


def _roomiest(polygon: Array, taken: list[Array], steps: int = 120, size: float = 0.035) -> tuple[Array, float]:
    """The point of a convex polygon, shape ``(corners, 2)``, furthest from its sides and from texts of ``size``.

    Returns the point and its distance, which is negative if no candidate lies inside.
    """
    first, second = np.divmod(np.arange((steps + 1) ** 2), steps + 1)
    first, second = first[first + second <= steps], second[first + second <= steps]
    points = _flat(np.column_stack([first, second, steps - first - second]) / steps)
    side = np.roll(polygon, -1, axis=0) - polygon
    long = np.hypot(*side.T) > 1e-9
    normal = np.column_stack([-side[long, 1], side[long, 0]]) / np.hypot(*side[long].T)[:, None]
    inside = ((polygon.mean(axis=0) - polygon[long]) * normal).sum(axis=1)
    room = (((points[:, None] - polygon[long]) * normal).sum(axis=2) * np.sign(inside)).min(axis=1)
    for text in taken:
        room = np.minimum(room, np.hypot(*(points - text).T) - size)
    best = int(room.argmax())
    return points[best], float(room[best])
