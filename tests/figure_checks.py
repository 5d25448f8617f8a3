"""Reads figures as a reader would: what is written in them, and whether it covers anything."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from tpme.reports.data.section import Section
from tpme.reports.figures.costs import make_plot, makers
from tpme.reports.figures.style import Plot, style
from tpme.reports.report import make_report


def all_plots(section: Section) -> list[Plot]:
    """Every figure that has data."""
    return [plot for make in makers([section]) if (plot := make_plot(make, section)) is not None]


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    """Extents of everything that is really written when the figure is drawn (not of ticks beyond the axes)."""
    drawn: dict[int, Text] = {}
    draw = Text.draw

    def spy(text: Text, renderer: Any) -> None:
        drawn[id(text)] = text
        draw(text, renderer)

    with mock.patch.object(Text, "draw", spy):
        figure.canvas.draw()
    canvas: Any = figure.canvas
    renderer = canvas.get_renderer()
    written = [text for text in drawn.values() if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in written]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other."""

    def inside(one: Any, other: Any) -> bool:
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        up = min(one.y1, other.y1) - max(one.y0, other.y0)
        return across > 1 and up > 1

    pairs = itertools.combinations(boxes(figure), 2)
    return [(a, b) for (a, one), (b, other) in pairs if inside(one, other)]


def write_crowd(factory: Any, count: int) -> None:
    """So many rows whose quality and costs crowd together."""
    generator = np.random.default_rng(count)
    factory.write("fft", time=22.0, millions=100.0, peak=40e9)
    for index in range(count - 1):
        factory.write(
            f"method_number_{index}"[: 6 + index % 10] + str(index),
            time=float(generator.choice([3.0, 12.0, 13.0, 20.0])) * generator.uniform(0.95, 1.05),
            millions=float(10 ** generator.uniform(-3, 1)),
            peak=float(generator.choice([5e9, 30e9, 32e9])) * generator.uniform(0.97, 1.03),
            skill=float(generator.choice([0.25, 0.27, 0.3])),
        )


def plot_of(factory: Any, name: str) -> Plot:
    """One figure of the records that ``factory`` wrote."""
    (section,) = make_report([factory.root]).sections
    return next(plot for plot in all_plots(section) if plot.name == name)


def enters(ends: Any, box: Any) -> bool:
    """Whether a line, shape ``(points, 2)`` in pixels, runs through a box."""
    share = np.linspace(0, 1, 2000)[:, None]
    along = np.vstack([start + share * (end - start) for start, end in itertools.pairwise(ends)])
    x, y = along.T
    return bool(((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)).any())


def written(figure: Figure) -> list[str]:
    """All texts of a figure."""
    with style():
        return [text for text, _ in boxes(figure)]
