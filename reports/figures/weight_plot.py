"""The figure of TPME's weights: which row has the lowest TPME under which weights of time, parameters and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tpme.reports.data.load import Array
from tpme.reports.data.section import Section
from tpme.reports.data.tpme import COLUMNS
from tpme.reports.figures.labels import halo
from tpme.reports.figures.style import (
    COLUMN_INCHES,
    SILVER,
    Look,
    Plot,
    new_figure,
    row_label,
)

WINNERS, LEAST_SHARE = 12, 0.01
"""Number of winners that the simplex tells apart, and the share of it that each must have."""
NEARLY_ALL = 0.9
"""From this share of all weights on, one row wins nearly everywhere: a sentence then says all that a figure would."""


def winner(section: Section) -> tuple[str, float] | None:
    """The row that has the lowest TPME under most weights, and its share of them; None for fewer than two rows."""
    if section.frame is None or len(section.compared) < 2:
        return None
    regions, share = _regions(section)
    first = next(iter(regions))
    return section.compared[first], share[first]


def weights(section: Section, looks: Mapping[str, Look]) -> Plot | None:
    """The simplex of TPME's weights, divided among the rows that have the lowest TPME somewhere.

    The largest regions have a number and the look of their row, and differ even in greyscale. Regions too small to see
    share one grey. None where one row wins nearly everywhere.
    """
    most = winner(section)
    if most is None or most[1] >= NEARLY_ALL:
        return None
    rows = section.compared
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
        look = looks[rows[row]]
        axes.fill(*regions[row].T, facecolor=look.colour, hatch=look.hatch, edgecolor="white", lw=0.6, label=label)
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
