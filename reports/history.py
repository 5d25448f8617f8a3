"""The history of rows over time and versions of the code, as SVG: a chart for each quantity, a dot for each record.

Records of one day, code version and commit share a place; places are evenly spaced in the order of time. Every axis
begins at 0, so that noise does not look like a change.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tpme.bench.quantities import quantity
from tpme.reports.data.trials import Line

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 24, 32
LABELLED = 4
"""Places with a label under the axis, at most."""
CHARTED = ("epoch_time_s", "memory_bytes")
"""Costs with a chart; the main quality has one, too."""


@dataclass(frozen=True)
class Place:
    """The records of one day, code version and commit."""

    day: str
    version: str
    commit: str
    records: tuple[Line, ...]

    @property
    def code(self) -> str:
        """The commit where the records know it, else the version of the measured code."""
        return self.commit or self.version


def places(records: Sequence[Line]) -> list[Place]:
    """The places of a row's records, in the order of time."""
    grouped: dict[tuple[str, str, str], list[Line]] = {}
    for line in sorted(records, key=lambda line: str(line["started_at"])):
        grouped.setdefault((line["started_at"][:10], line["version"][:7], line["commit"]), []).append(line)
    return [Place(*key, tuple(lines)) for key, lines in grouped.items()]


def chart(key: str, row: str, history: Sequence[Place]) -> str:
    """One quantity over all places, as an SVG figure; empty where no record has a value."""
    values = [[line[key] for line in place.records if _known(line, key)] for place in history]
    if not any(values):
        return ""
    what = quantity(key)
    unit, scale = what.scale(value for of_place in values for value in of_place)
    top = max(value for of_place in values for value in of_place) or 1.0
    step = (WIDTH - LEFT - RIGHT) / max(1, len(history) - 1)
    across = [
        LEFT + (place * step if len(history) > 1 else (WIDTH - LEFT - RIGHT) / 2) for place in range(len(history))
    ]
    base = HEIGHT - BOTTOM

    def up(value: float) -> float:
        return base - (base - TOP) * value / (1.1 * top)

    means = [(x, up(sum(of_place) / len(of_place))) for x, of_place in zip(across, values, strict=True) if of_place]
    parts = [
        f'<text class="head" x="0" y="12">{html.escape(what.label(unit))}</text>',
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>',
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(top):.1f}" y2="{up(top):.1f}"/>',
        f'<text x="{LEFT - 9}" y="{base + 4}" text-anchor="end">0</text>',
        f'<text x="{LEFT - 9}" y="{up(top) + 4:.1f}" text-anchor="end">{what.format(top / scale)}</text>',
        *_turns(history, across, base),
        f'<polyline class="mean" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in means)}"/>',
    ]
    for place, x in zip(history, across, strict=True):
        for line in place.records:
            if _known(line, key):
                parts.append(_dot(line, place, x, up(line[key]), f"{what.format(line[key] / scale)} {unit}".strip()))
            elif line["status"] != "ok":
                parts.append(_dot(line, place, x, base, line["status"]))
    label = html.escape(
        f"{what.header} of {row} over {len(history)} days or versions; the list below holds the numbers"
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _known(line: Line, key: str) -> bool:
    return line["status"] == "ok" and line[key] is not None and not math.isnan(line[key])


def _turns(history: Sequence[Place], across: Sequence[float], base: float) -> list[str]:
    """Dashed lines where the code changed, and labels of evenly spread places."""
    last = len(history) - 1
    stride = max(1, math.ceil(last / (LABELLED - 1)))
    labelled = {*range(0, last - stride + 1, stride), last}
    parts = []
    for index, (place, x) in enumerate(zip(history, across, strict=True)):
        if index and place.code != history[index - 1].code:
            parts.append(f'<line class="turn" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>')
        if index in labelled:
            anchor = "middle" if 0 < index < last else "end" if index else "start"
            for offset, text in ((13, place.day), (25, place.code)):
                parts.append(f'<text x="{x:.1f}" y="{base + offset}" text-anchor="{anchor}">{html.escape(text)}</text>')
    return parts


def _dot(line: Line, place: Place, x: float, y: float, text: str) -> str:
    """A record: a dot, or a cross on the axis where it did not finish; its title says all, a click opens the file."""
    facts = [text, f"seed {line['seed']}", place.day, f"code {place.version}"]
    facts += [f"commit {place.commit}"] if place.commit else []
    facts += ["newest"] if line["latest"] else []
    title = f"<title>{html.escape(', '.join(facts))}</title>"
    if line["status"] != "ok":
        shape = f'<path class="end" d="M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6">{title}</path>'
    else:
        now = " now" if line["latest"] else ""
        shape = f'<circle class="dot{now}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{title}</circle>'
    return f'<a href="{html.escape(line["link"])}" tabindex="-1">{shape}</a>'
