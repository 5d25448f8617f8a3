"""Names beside points, so that no name covers another one, a point or a line, and each is seen to belong to its point.

Positions are pixels. Boxes are arrays ``(x0, y0, x1, y1)``, lines are ``(x0, y0, x1, y1)`` from start to end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patheffects import withStroke

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Line = tuple[npt.ArrayLike, npt.ArrayLike]
"""Start and end."""

NEAR_PT = 5.0
"""A name further than this from its point gets a line to it."""
MARKER_PT = 3.0
CROWD_PT = 40.0
PADDING_PT = 1.0
KEPT, KEPT_IN_ALL, TRIES, SHAKEN = 80, 2400, 100, 4
"""Places of a name that are looked at, if there are few names; how often the search starts anew, and how many names it
moves to do so."""
COVERED, CUT, CROSSED, UNCLEAR, TOUCHED, PER_PT = 100.0, 12.0, 4.0, 2.0, 2.5, 0.08
"""What it costs to cover a name or point, to cut a name with a line, to cross a line or point with the line to a name,
to be nearer to another point than to the own one, to cover a bar or lead along one, and each 1/72 inch."""


def halo() -> list[Any]:
    """A white edge around a text that may lie on a line."""
    return [withStroke(linewidth=1.4, foreground="white")]


@dataclass(frozen=True)
class _Places:
    """Where a name may stand: boxes, the line from its point to each, whether that is drawn, and what each costs."""

    boxes: Floats
    leads: Floats
    led: Flags
    cost: Floats


def place_labels(
    axes: Any,
    points: npt.ArrayLike,
    names: Sequence[str],
    size: float = 6,
    lines: Sequence[Line] = (),
    bars: Sequence[Line] = (),
) -> None:
    """Write a name beside every point.

    Of the places on rings around its point each name takes the cheapest, again and again, until none moves; then some
    are moved at random and the search goes on from there if it leads to less. The same points give the same picture.
    Measures the axes as they are, so it comes last.

    Args:
        axes: what the points are drawn in.
        points: shape ``(points, 2)``, as everything else in the coordinates of the data.
        names: one a point.
        size: of the text in points.
        lines: no name should lie on them.
        bars: a name may lie on one of them where there is little room.
    """
    renderer = axes.figure.canvas.get_renderer()
    pt = axes.figure.dpi / 72
    data: Floats = np.asarray(points, dtype=np.float64)
    spots: Floats = axes.transData.transform(data)
    window = np.asarray(axes.get_window_extent(renderer).extents, dtype=np.float64)
    drawn = _pixels(axes, lines), _pixels(axes, bars)
    places = [
        _places(index, spots, _extent(axes, name, size, renderer), window, drawn, pt)
        for index, name in enumerate(names)
    ]
    for index, best in enumerate(_choose(places, PADDING_PT * pt)):
        box, lead = places[index].boxes[best], places[index].leads[best]
        _write(axes, data[index], names[index], (box.reshape(2, 2).mean(axis=0) - spots[index]) / pt, size)
        if places[index].led[best]:
            _lead(axes, data[index], (lead[2:] - spots[index]) / pt)


def _choose(places: Sequence[_Places], padding: float) -> list[int]:
    """The place of every name: iterated local search."""
    alone, together = np.concatenate([one.cost for one in places]), _together(places, padding)
    first = np.cumsum([0, *(len(one.cost) for one in places)])

    def settle(chosen: npt.NDArray[np.int64]) -> float:
        """Move names until none gains by it; returns what all cost then."""
        moved = True
        while moved:
            moved = False
            for index, (start, end) in enumerate(itertools.pairwise(first)):
                cost = alone[start:end] + together[start:end, chosen].sum(axis=1)
                if cost.min() < cost[chosen[index] - start] - 1e-9:
                    chosen[index], moved = start + cost.argmin(), True
        return float(alone[chosen].sum() + together[np.ix_(chosen, chosen)].sum() / 2)

    best = first[:-1].copy()  # the cheapest of every name come first
    least = settle(best)
    draw = np.random.default_rng(0)
    for _ in range(TRIES):
        tried = best.copy()
        for index in draw.choice(len(places), min(SHAKEN, len(places)), replace=False):
            tried[index] = draw.integers(first[index], first[index + 1])
        cost = settle(tried)
        if cost < least:
            best, least = tried, cost
    return [int(place) for place in best - first[:-1]]


def _together(places: Sequence[_Places], padding: float) -> Floats:
    """What two places of different names cost together, shape ``(places of all names, places of all names)``."""
    boxes, leads = np.vstack([one.boxes for one in places]), np.vstack([one.leads for one in places])
    led = np.concatenate([one.led for one in places])
    owner = np.repeat(np.arange(len(places)), [len(one.cost) for one in places])
    wide = boxes + padding * np.array([-1, -1, 1, 1])
    around = np.hstack([np.minimum(leads[:, :2], leads[:, 2:]), np.maximum(leads[:, :2], leads[:, 2:])])
    cost: Floats = COVERED * _overlap(wide[:, None], boxes).astype(np.float64)
    one, other = np.nonzero(_overlap(around[:, None], boxes) & led[:, None])
    cut = _enters(leads[one], wide[other])
    cost[one[cut], other[cut]] += CUT
    cost[other[cut], one[cut]] += CUT
    one, other = np.nonzero(_overlap(around[:, None], around) & led[:, None] & led)
    cost[one, other] += CROSSED * _cross(leads[one], leads[other])
    cost[owner[:, None] == owner] = 0
    return cost


def _places(index: int, spots: Floats, extent: Any, window: Floats, drawn: tuple[Floats, Floats], pt: float) -> _Places:
    """The places of one name and what they cost whatever the other names do."""
    spot, (lines, bars) = spots[index], drawn
    boxes = _boxes(spot, extent.width, extent.height, pt)
    outside = (boxes[:, :2] < window[:2]).any(axis=1) | (boxes[:, 2:] > window[2:]).any(axis=1)
    boxes = boxes[~outside] if not outside.all() else boxes[:1]
    leads = np.hstack([np.tile(spot, (len(boxes), 1)), np.clip(spot, boxes[:, :2], boxes[:, 2:])])
    away = np.linalg.norm(leads[:, 2:] - spot, axis=1)
    others = np.delete(spots, index, axis=0)
    gaps = np.linalg.norm(others - np.clip(others, boxes[:, None, :2], boxes[:, None, 2:]), axis=2)
    unclear = gaps.min(axis=1, initial=np.inf) <= away
    led = (away > NEAR_PT * pt) | unclear
    edge, room = np.array([-1, -1, 1, 1]) * pt, MARKER_PT * pt * np.array([-1, -1, 1, 1])
    markers, wide = np.tile(spots, 2) + room, boxes + PADDING_PT * edge
    along = (np.abs(leads[:, 2] - spot[0]) < pt) & _enters(bars, np.tile(spot, 2) + edge).any()
    cost = (
        COVERED * _overlap(boxes[:, None], markers).sum(axis=1)
        + CUT * _enters(lines, wide[:, None]).sum(axis=1)
        + TOUCHED * _enters(bars, wide[:, None]).sum(axis=1)
        + UNCLEAR * unclear
        + led * CROSSED * _enters(leads[:, None], np.delete(markers, index, axis=0)).sum(axis=1)
        + led * TOUCHED * (_cross(leads[:, None], lines).sum(axis=1) + along)
        + PER_PT * away / pt
    )
    kept = np.argsort(cost, kind="stable")[: min(KEPT, KEPT_IN_ALL // len(spots) + 1)]
    return _Places(boxes[kept], leads[kept], led[kept], cost[kept])


def _pixels(axes: Any, lines: Sequence[Line]) -> Floats:
    ends = np.asarray(lines, dtype=np.float64).reshape(-1, 2)
    return np.asarray(axes.transData.transform(ends), dtype=np.float64).reshape(-1, 4)


def _extent(axes: Any, name: str, size: float, renderer: Any) -> Any:
    text = axes.text(0, 0, name, fontsize=size)
    extent = text.get_window_extent(renderer)
    text.remove()
    return extent


def _write(axes: Any, point: Floats, name: str, offset: Floats, size: float) -> None:
    axes.annotate(
        name, point, xytext=tuple(offset), textcoords="offset points", fontsize=size, ha="center", va="center",
        annotation_clip=False, path_effects=halo(), zorder=5,
    )  # fmt: skip


def _lead(axes: Any, point: Floats, offset: Floats) -> None:
    axes.annotate(
        "", point, xytext=tuple(offset), textcoords="offset points", annotation_clip=False, zorder=2.5,
        arrowprops={"arrowstyle": "-", "lw": 0.35, "color": "black", "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip


def _boxes(spot: Floats, width: float, height: float, pt: float, directions: int = 24, rings: int = 14) -> Floats:
    """Boxes around a point, shape ``(places, 4)``: nearest first, beside it before above and below.

    Rings lie further apart the wider they are. In each direction a box touches the ring with a corner, or with its
    side at two places.
    """
    turns = np.arange(directions)
    angle = 2 * math.pi * turns / directions
    order = np.lexsort((turns, np.abs(np.sin(angle)).round(6), turns % (directions // 4) != 0))
    toward = np.stack([np.cos(angle), np.sin(angle)], axis=1)[order].round(9)
    half = np.array([width, height]) / 2
    gaps = (4 + 2.5 * np.arange(rings) + 0.25 * np.arange(rings) ** 2) * pt
    reach = np.stack([(slant * toward).clip(-1, 1) for slant in (100, 1.8, 1.1)])
    centres = spot + gaps[:, None, None, None] * toward + half * reach
    return np.concatenate([centres - half, centres + half], axis=3).reshape(-1, 4)


def _overlap(one: Floats, other: Floats) -> Flags:
    """Which boxes overlap, in the shape the two broadcast to."""
    return np.asarray(
        (one[..., 2] > other[..., 0])
        & (one[..., 0] < other[..., 2])
        & (one[..., 3] > other[..., 1])
        & (one[..., 1] < other[..., 3])
    )


def _enters(lines: Floats, boxes: Floats) -> Flags:
    """Which lines enter which boxes (Liang and Barsky's clipping), in the shape the two broadcast to."""
    start, step = lines[..., :2], lines[..., 2:] - lines[..., :2]
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    one, other = (boxes[..., :2] - start) / step, (boxes[..., 2:] - start) / step
    enter = np.minimum(one, other).max(axis=-1).clip(min=0)
    leave = np.maximum(one, other).min(axis=-1).clip(max=1)
    return np.asarray(enter < leave)


def _cross(one: Floats, other: Floats) -> Flags:
    """Which lines cross, in the shape the two broadcast to."""

    def side(a: Floats, b: Floats, c: Floats) -> Floats:
        ab, ac = b - a, c - a
        return np.asarray(np.sign(ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]))

    a, b, c, d = one[..., :2], one[..., 2:], other[..., :2], other[..., 2:]
    return np.asarray((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0))
