"""Names beside points, so that no name covers another one or a point, and the lines that lead to names stay clear.

Positions are pixels. Boxes are arrays ``(x0, y0, x1, y1)``, lines are ``(x0, y0, x1, y1)`` from start to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patheffects import withStroke

from tpme.reports.style import GREY

Floats = npt.NDArray[np.float64]

NEAR_PT = 5.0
"""A name further than this from its point gets a line to it."""
MARKER_PT = 3.0
CROWD_PT = 40.0
PADDING_PT = 1.0
COVERED, CUT, CROSSED, PER_PT = 100.0, 6.0, 4.0, 0.05
"""What it costs to cover a name or point, to cut a name with a line, to cross a line or point, and each 1/72 inch."""


def halo() -> list[Any]:
    """A white edge around a text that may lie on a line."""
    return [withStroke(linewidth=1.4, foreground="white")]


def place_labels(axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str], size: float = 6) -> None:
    """Write a name beside every point.

    Greedy and deterministic: the points in the largest crowds choose first, each the cheapest of the places on
    rings around it. Measures the axes as they are, so it comes last.
    """
    renderer = axes.figure.canvas.get_renderer()
    pt = axes.figure.dpi / 72
    spots: Floats = np.asarray(axes.transData.transform(list(points)), dtype=np.float64)
    window = np.asarray(axes.get_window_extent(renderer).extents, dtype=np.float64)
    markers = np.hstack([spots - MARKER_PT * pt, spots + MARKER_PT * pt])
    placed, lines = np.empty((0, 4)), np.empty((0, 4))
    crowd = (np.linalg.norm(spots[:, None] - spots[None], axis=2) < CROWD_PT * pt).sum(axis=1)
    for index in sorted(range(len(spots)), key=lambda i: (-crowd[i], *spots[i], names[i])):
        text = axes.text(0, 0, names[index], fontsize=size)
        extent = text.get_window_extent(renderer)
        text.remove()
        boxes = _places(spots[index], extent.width, extent.height, pt)
        outside = (boxes[:, :2] < window[:2]).any(axis=1) | (boxes[:, 2:] > window[2:]).any(axis=1)
        boxes = boxes[~outside] if not outside.all() else boxes[:1]
        leads = np.hstack([np.tile(spots[index], (len(boxes), 1)), np.clip(spots[index], boxes[:, :2], boxes[:, 2:])])
        away = np.linalg.norm(leads[:, 2:] - leads[:, :2], axis=1)
        others = np.delete(markers, index, axis=0)
        led = away > NEAR_PT * pt
        cost = (
            COVERED * _overlaps(boxes, np.vstack([markers, placed])).sum(axis=1)
            + CUT * _crosses(lines, boxes).sum(axis=0)
            + led * (CUT * _crosses(leads, placed).sum(axis=1) + CROSSED * _crosses(leads, others).sum(axis=1))
            + led * CROSSED * _meet(leads, lines).sum(axis=1)
            + PER_PT * away / pt
        )
        best = int(cost.argmin())
        placed = np.vstack([placed, boxes[best] + PADDING_PT * pt * np.array([-1, -1, 1, 1])])
        lines = np.vstack([lines, leads[best]]) if led[best] else lines
        _write(axes, points[index], names[index], (boxes[best].reshape(2, 2).mean(axis=0) - spots[index]) / pt, size)
        if led[best]:
            _lead(axes, points[index], (leads[best, 2:] - spots[index]) / pt)


def _write(axes: Any, point: tuple[float, float], name: str, offset: Floats, size: float) -> None:
    axes.annotate(
        name, point, xytext=tuple(offset), textcoords="offset points", fontsize=size, ha="center", va="center",
        annotation_clip=False, path_effects=halo(), zorder=5,
    )  # fmt: skip


def _lead(axes: Any, point: tuple[float, float], offset: Floats) -> None:
    axes.annotate(
        "", point, xytext=tuple(offset), textcoords="offset points", annotation_clip=False, zorder=4,
        arrowprops={"arrowstyle": "-", "lw": 0.35, "color": GREY, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip


def _places(spot: Floats, width: float, height: float, pt: float, directions: int = 24, rings: int = 40) -> Floats:
    """Boxes around a point, shape ``(rings * directions, 4)``: nearest first, beside it before above and below."""
    turns = np.arange(directions)
    angle = 2 * math.pi * turns / directions
    order = np.lexsort((turns, np.abs(np.sin(angle)).round(6), turns % (directions // 4) != 0))
    toward = np.stack([np.cos(angle), np.sin(angle)], axis=1)[order].round(9)
    half = np.array([width, height]) / 2
    gaps = (4 + 3 * np.arange(rings)) * pt
    centres = spot + gaps[:, None, None] * toward + half * np.sign(toward)
    return np.concatenate([centres - half, centres + half], axis=2).reshape(-1, 4)


def _overlaps(one: Floats, other: Floats) -> npt.NDArray[np.bool_]:
    """Which boxes overlap, shape ``(one, other)``."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    return np.asarray((high > low).all(axis=2))


def _crosses(lines: Floats, boxes: Floats) -> npt.NDArray[np.bool_]:
    """Which lines enter which boxes (Liang and Barsky's clipping), shape ``(lines, boxes)``."""
    start, step = lines[:, None, :2], (lines[:, 2:] - lines[:, :2])[:, None]
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    one, other = (boxes[None, :, :2] - start) / step, (boxes[None, :, 2:] - start) / step
    enter = np.minimum(one, other).max(axis=2).clip(min=0)
    leave = np.maximum(one, other).min(axis=2).clip(max=1)
    return np.asarray(enter < leave)


def _meet(one: Floats, other: Floats) -> npt.NDArray[np.bool_]:
    """Which lines cross, shape ``(one, other)``."""

    def side(a: Floats, b: Floats, c: Floats) -> Floats:
        ab, ac = b - a, c - a
        return np.asarray(np.sign(ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]))

    a, b = one[:, None, :2], one[:, None, 2:]
    c, d = other[None, :, :2], other[None, :, 2:]
    return np.asarray((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0))
