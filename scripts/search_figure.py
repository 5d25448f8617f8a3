"""The Pareto set of AutoPEFT, and the order of its trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from search_comparison import searches, shares, trials_of

from tpme.methods.parts.search_front import Points, non_dominated
from tpme.reports.figures.style import COLOURS, GREY, INK, PAGE_INCHES, SILVER, margins, new_figure


def autopeft(run: Path) -> Figure:
    """Left: the trials of the first seed's search in their order and the Pareto set. Right: what was dominated when.

    Raises UserError where ``run`` has no search.
    """
    found = searches(run)
    first = min(found, key=lambda key: (key[1], key[0] == "random"))
    figure = new_figure(PAGE_INCHES, 2.6)
    left, right = figure.subplots(1, 2)
    _draw_trials(figure, left, trials_of(found[first]), int(found[first].counters["procedure_winner"].value or 0) - 1)
    left.set_title(f"trials of one search ({first[0]}, seed {first[1]}) in their order")
    _draw_areas(right, shares({key: trials_of(result) for key, result in found.items()}))
    margins(figure, 0.65, 0.1, 0.4, 0.25, across=0.75)
    return figure


def _draw_trials(figure: Figure, axes: Any, trials: Points, winner: int) -> None:
    """Points (parameters, NDCG@10), numbered and shaded by their order; a step line through the Pareto set."""
    parameters, quality = trials.T
    front = np.flatnonzero(non_dominated(np.stack([-parameters, quality], axis=1)))
    front = front[np.argsort(trials[front, 0])]
    axes.step(trials[front, 0], trials[front, 1], where="post", color=INK, lw=0.8, zorder=1)
    points = axes.scatter(parameters, quality, c=np.arange(len(trials)) + 1, cmap="viridis_r", s=12, zorder=2, lw=0)
    figure.colorbar(points, ax=axes, label="trial", pad=0.02)
    for place in front:
        axes.annotate(str(place + 1), trials[place], (2, 3), textcoords="offset points", fontsize=5.5, color=INK)
    axes.scatter(*trials[winner], s=45, facecolors="none", edgecolors=COLOURS[0], lw=1, zorder=3)
    axes.annotate("winner", trials[winner], (-4, -9), textcoords="offset points", color=COLOURS[0], ha="right")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("parameters of the modules")
    axes.set_ylabel("NDCG@10 on validation")


def _draw_areas(axes: Any, areas: Mapping[tuple[str, int], Points]) -> None:
    """Thin lines: the dominated share after each trial of every search; thick ones: means over seeds."""
    engines = sorted({engine for engine, _ in areas}, key=lambda engine: engine == "random")
    for engine, colour in zip(engines, (COLOURS[1], GREY, SILVER), strict=False):
        lines = [area for (name, _), area in areas.items() if name == engine]
        for line in lines:
            axes.plot(range(1, len(line) + 1), line, color=colour, lw=0.4, alpha=0.6)
        length = min(map(len, lines))
        mean = np.mean([line[:length] for line in lines], axis=0)
        axes.plot(
            range(1, length + 1), mean, color=colour, lw=1.6, ls="--" if engine == "random" else "-", label=engine
        )
    seeds = f"{len(lines)} seeds" if len(lines) > 1 else "one seed"
    axes.set_title(f"what the trials dominate, {seeds}")
    axes.set_xlabel("trials")
    axes.set_ylabel("share of the area up to the best")
    axes.legend(frameon=False, loc="lower right")
