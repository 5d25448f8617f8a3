"""Names beside points, with lines to those that are far off: none covers or crosses another.

Positions are pixels, boxes are arrays ``(x0, y0, x1, y1)``, lines ``(x, y)`` to ``(x, y)`` are arrays ``(2 ends, 2)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patheffects import withStroke

from tpme.reports.data.stats import Floats

Mask = npt.NDArray[np.bool_]

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
    first: Sequence[int] = (),
) -> list[str]:
    """Write a name beside every point and return the names for which there is no room.

    Each name takes the nearest free place on rings around its point, with a line to it if that is far away or nearer to
    another point; no line crosses another or runs through a name. Of several orders in which the names choose, the best
    by ``_badness`` wins. Measures the axes as they are: call it last.

    Args:
        axes: the axes with the points.
        points: shape ``(points, 2)``, in the coordinates of the data.
        names: one for each point.
        size: of the text in points.
        lines: horizontal and vertical ones, shape ``(lines, 2 ends, 2)``; no name covers one.
        first: places of the points whose names choose before all others.
        bars: like ``lines``, but a name may cover one if it finds no other place near its point.
    """
    renderer, pt = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    spots: Floats = axes.transData.transform(points)
    texts = [
        axes.annotate(
            name, point, xytext=(0, 0), textcoords="offset points", fontsize=size, ha="center", va="center",
            annotation_clip=False, path_effects=halo(), zorder=5,
        )
        for point, name in zip(np.asarray(points), names, strict=True)
    ]  # fmt: skip
    candidates = _candidates(
        spots,
        np.array([text.get_window_extent(renderer).size for text in texts]).reshape(-1, 2),
        np.asarray(axes.get_window_extent(renderer).extents),
        _boxes(_pixels(axes, lines), pt),
        _boxes(_pixels(axes, bars), pt),
        pt,
    )
    leading = np.isin(np.arange(len(names)), first)
    attempts = (_place(candidates, order[np.argsort(~leading[order], kind="stable")]) for order in _orders(spots))
    best = min(attempts, key=lambda chosen: (-len({*first} & chosen.keys()), *_badness(candidates, chosen)))
    for index, (text, point) in enumerate(zip(texts, np.asarray(points), strict=True)):
        if index not in best:
            text.remove()
            continue
        own, place = candidates[index], best[index]
        text.set_position((own.boxes[place].reshape(2, 2).mean(axis=0) - spots[index]) / pt)
        if own.drawn[place]:
            lead = own.leads[place]
            axes.annotate(
                "", point, xytext=(lead[1] - lead[0]) / pt, textcoords="offset points", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "lw": 0.35, "color": "black", "shrinkA": 0, "shrinkB": 0}, zorder=2.5,
            )  # fmt: skip
    return [name for index, name in enumerate(names) if index not in best]


@dataclass(frozen=True)
class _Candidates:
    """Places for the name of one point, nearest first, with what is known before other names are placed."""

    boxes: Floats
    """Shape ``(places, 4)``."""
    leads: Floats
    """Lines from the point to the boxes, shape ``(places, 2 ends, 2)``."""
    far: Floats
    """Length of these lines."""
    drawn: Mask
    """Whether the name is so far from its point, or so near to another, that it needs the line."""
    free: Mask
    """In the axes, and on neither a point nor a line."""
    through: Mask
    """Its line is needed, and runs through another point."""
    clear: Mask
    """Near and free, on no bar, and not through another point."""


def _candidates(
    spots: Floats, sizes: Floats, window: Floats, lines: Floats, bars: Floats, pt: float
) -> list[_Candidates]:
    """The candidates of every point; sizes of names, window, lines and bars in pixels, ``pt`` pixels to a point."""
    points = _boxes(spots[:, None], 3 * pt)
    found = []
    for spot, size in zip(spots, sizes, strict=True):
        boxes = _places(spot, size, RING_PT * pt)
        ends = spot.clip(boxes[:, :2], boxes[:, 2:])
        leads = np.stack([np.broadcast_to(spot, ends.shape), ends], axis=1)
        far = np.linalg.norm(ends - spot, axis=1)
        nearest = np.linalg.norm(spots.clip(boxes[:, None, :2], boxes[:, None, 2:]) - spots, axis=2).min(axis=1)
        drawn = far > np.minimum(LEAD_PT * pt, 1.001 * nearest)
        inside = (boxes[:, :2] >= window[:2]).all(axis=1) & (boxes[:, 2:] <= window[2:]).all(axis=1)
        free = inside & ~_overlap(boxes, np.vstack([points, lines]))
        away = points[~_overlap(points, np.hstack([spot, spot]))]
        through = drawn & _enter(leads, away).any(axis=1)
        clear = free & ~_overlap(boxes, bars) & ~through
        clear[NEAR * len(DIRECTIONS) :] = False
        margin = pt * np.array([-1, -1, 1, 1])
        found.append(_Candidates(boxes + margin, leads, far, drawn, free, through, clear))
    return found


def _orders(spots: Floats) -> Iterator[npt.NDArray[np.int64]]:
    """Orders in which names choose: as given, from the left, right, bottom and top, the most crowded first, last."""
    apart = np.linalg.norm(spots[:, None] - spots, axis=2)
    lonely = np.sort(apart, axis=1)[:, :4].sum(axis=1)
    yield np.arange(len(spots))
    for key in (*spots.T, *-spots.T, lonely, -lonely):
        yield np.argsort(key, kind="stable")


def _badness(candidates: Sequence[_Candidates], chosen: Mapping[int, int]) -> tuple[int, int, float]:
    """Names without a place, lines through other points, and how far all names are from their points."""
    own = [(candidates[index], place) for index, place in chosen.items()]
    through = sum(int(one.through[place]) for one, place in own)
    return len(candidates) - len(own), through, sum(float(one.far[place]) for one, place in own)


def _place(candidates: Sequence[_Candidates], order: npt.NDArray[np.int64]) -> dict[int, int]:
    """The place of each point's name, chosen in this order; without those for which none is free."""
    chosen: dict[int, int] = {}
    names, others = np.empty((0, 4)), np.empty((0, 2, 2))
    for index in map(int, order):
        own = candidates[index]
        free = own.free.copy()
        at = np.flatnonzero(free)
        boxes, leads = own.boxes[at], own.leads[at]
        crossed = _enter(leads, names).any(axis=1) | _cross(leads, others).any(axis=1)
        free[at] = ~(_overlap(boxes, names) | _enter(others, boxes).any(axis=0) | (own.drawn[at] & crossed))
        mask = next((mask for mask in (free & own.clear, free & ~own.through, free) if mask.any()), None)
        if mask is not None:
            place = int(mask.argmax())
            chosen[index] = place
            names = np.vstack([names, own.boxes[place]])
            others = np.vstack([others, own.leads[place][None]]) if own.drawn[place] else others
    return chosen


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


def _overlap(places: Floats, others: npt.ArrayLike) -> Mask:
    """Which of ``places`` overlap any of the other boxes, shape ``(places,)``."""
    a, b = places[:, None], np.asarray(others).reshape(1, -1, 4)
    both: Mask = (a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])
    return np.asarray(np.any(np.all(both, axis=2), axis=1))


def _enter(lines: Floats, boxes: Floats) -> Mask:
    """Which lines, shape ``(lines, 2 ends, 2)``, run through which boxes; shape ``(lines, boxes)``.

    A line is inside a box from the largest entry to the smallest exit of the two axes (the slab method).
    """
    start, along = lines[:, None, 0], lines[:, None, 1] - lines[:, None, 0]
    along = np.where(np.abs(along) < 1e-9, 1e-9, along)
    one, other = (boxes[None, :, :2] - start) / along, (boxes[None, :, 2:] - start) / along
    enters, leaves = np.minimum(one, other).max(axis=2), np.maximum(one, other).min(axis=2)
    return np.asarray(np.maximum(enters, 0) < np.minimum(leaves, 1) - 1e-9)


def _cross(lines: Floats, others: Floats) -> Mask:
    """Which lines cross which others, shape ``(lines, others)``; lines that meet at an end do not cross."""

    def side(line: Floats, point: Floats) -> Floats:
        along, toward = line[..., 1, :] - line[..., 0, :], point - line[..., 0, :]
        return np.asarray(along[..., 0] * toward[..., 1] - along[..., 1] * toward[..., 0])

    a, b = lines[:, None], others[None]
    apart = side(a, b[..., 0, :]) * side(a, b[..., 1, :]) < 0
    return np.asarray(apart & (side(b, a[..., 0, :]) * side(b, a[..., 1, :]) < 0))
