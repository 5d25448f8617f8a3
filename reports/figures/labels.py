"""Names beside points, placed by the rule of the report's page (``placeNames`` in ``assets/page.js``).

Positions are pixels, boxes are arrays ``(x0, y0, x1, y1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patheffects import withStroke

from tpme.reports.data.stats import Floats

RING_PT, RINGS, NEAR = 4.5, 40, 4
"""Distance between rings, their number, and how many of them a name tries before it may cover a bar."""
LEAD_PT = 10.0
"""A name further than this from its point gets a line to it."""
DIRECTIONS = 2 * np.pi / 32 * np.array([turn + 1 if turn % 2 else -turn for turn in range(16)])
"""To the right first, then alternately above and below it."""


def halo() -> list[Any]:
    """A white edge around a text that may lie on a line."""
    return [withStroke(linewidth=1.4, foreground="white")]


def place_labels(
    axes: Any,
    points: npt.ArrayLike,
    names: Sequence[str],
    size: float = 6,
    lines: Sequence[Any] = (),
    bars: Sequence[Any] = (),
) -> list[str]:
    """Write a name beside every point and return the names for which there is no room.

    Greedy: each name takes the nearest free place on rings around its point, with a line to it if that is far away
    or nearer to another point.
    Measures the axes as they are: call it last.

    Args:
        axes: the axes with the points.
        points: shape ``(points, 2)``, in the coordinates of the data.
        names: one for each point.
        size: of the text in points.
        lines: horizontal and vertical ones, shape ``(lines, 2 ends, 2)``; no name covers one.
        bars: like ``lines``, but a name may cover one if it finds no other place near its point.
    """
    renderer, pt = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    window = np.asarray(axes.get_window_extent(renderer).extents)
    spots: Floats = axes.transData.transform(points)
    taken = [*_boxes(spots[:, None], 3 * pt), *_boxes(_pixels(axes, lines), pt)]
    soft = _boxes(_pixels(axes, bars), pt)
    unplaced = []
    for point, spot, name in zip(np.asarray(points), spots, names, strict=True):
        text = axes.annotate(
            name, point, xytext=(0, 0), textcoords="offset points", fontsize=size, ha="center", va="center",
            annotation_clip=False, path_effects=halo(), zorder=5,
        )  # fmt: skip
        places = _places(spot, np.asarray(text.get_window_extent(renderer).size), RING_PT * pt)
        inside = (places[:, :2] >= window[:2]).all(axis=1) & (places[:, 2:] <= window[2:]).all(axis=1)
        free = inside & ~_overlap(places, taken)
        clear = free[: NEAR * len(DIRECTIONS)] & ~_overlap(places[: NEAR * len(DIRECTIONS)], soft)
        if not free.any():
            text.remove()
            unplaced.append(name)
            continue
        place = int(clear.argmax() if clear.any() else free.argmax())
        box = places[place]
        taken.append(box + pt * np.array([-1, -1, 1, 1]))
        text.set_position((box.reshape(2, 2).mean(axis=0) - spot) / pt)
        lead = spot.clip(box[:2], box[2:]) - spot
        nearest = np.linalg.norm(spots.clip(box[:2], box[2:]) - spots, axis=1).min()
        if np.linalg.norm(lead) > min(LEAD_PT * pt, 1.001 * nearest):
            axes.annotate(
                "", point, xytext=lead / pt, textcoords="offset points", annotation_clip=False, zorder=2.5,
                arrowprops={"arrowstyle": "-", "lw": 0.35, "color": "black", "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
    return unplaced


def _places(spot: Floats, size: Floats, gap: float) -> Floats:
    """Boxes of a text of ``size`` around a point, nearest ring first, shape ``(RINGS * directions, 4)``."""
    toward = np.column_stack([np.cos(DIRECTIONS), np.sin(DIRECTIONS)])
    side = np.where(np.abs(toward) < 0.2, 0, np.sign(toward)) * size / 2
    centre = (spot + gap * np.arange(1, RINGS + 1)[:, None, None] * toward + side).reshape(-1, 2)
    return np.hstack([centre - size / 2, centre + size / 2])


def _pixels(axes: Any, lines: Sequence[Any]) -> Floats:
    ends = np.asarray(lines, dtype=np.float64).reshape(-1, 2)
    return np.asarray(axes.transData.transform(ends)).reshape(-1, 2, 2)


def _boxes(ends: Floats, margin: float) -> Floats:
    """Boxes around points or lines, shape of ``ends`` ``(boxes, points of each, 2)``."""
    return np.hstack([ends.min(axis=1) - margin, ends.max(axis=1) + margin])


def _overlap(places: Floats, others: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which of ``places`` overlap any of the other boxes, shape ``(places,)``."""
    a, b = places[:, None], np.asarray(others).reshape(1, -1, 4)
    both: npt.NDArray[np.bool_] = (a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])
    return np.asarray(np.any(np.all(both, axis=2), axis=1))
