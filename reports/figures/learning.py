"""The figure of learning curves: training loss and validation quality of every row, per epoch and over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from tpme.bench.record import CellResult
from tpme.reports.data.qualities import validated, validation
from tpme.reports.data.section import Section
from tpme.reports.figures.style import (
    COLOURS,
    LOG_FROM,
    PAGE_INCHES,
    SILVER,
    Look,
    Plot,
    log_axis,
    margins,
    new_figure,
    row_label,
    text_width,
)

PER_LINE = len(COLOURS)
"""Rows in colour in a line of panels: as many as can be told apart."""
MOST_BEHIND = 40
"""Rows up to which each panel shows all others in grey; more would hide its own."""


def learning_curves(section: Section, looks: Mapping[str, Look]) -> Plot | None:
    """Curves of one run of every row (its first seed); None where nothing was trained.

    Six rows a line of panels, in the order of the tables, each with the others in grey behind them if these are few.
    """
    runs = {name: one.result for name, one in section.firsts().items() if one.result.epochs}
    if not runs:
        return None
    names = list(runs)
    curve = validated(epoch for result in runs.values() for epoch in result.epochs)
    shown = curve if "valid" in curve else f"validation {curve}".strip()
    part = "epoch" if section.ranked or "time_of" not in section.group.key else "part"
    groups = [names[start : start + PER_LINE] for start in range(0, len(names), PER_LINE)]
    height = 0.55 + 1.5 * len(groups)
    figure = new_figure(PAGE_INCHES, height)
    panels = figure.subplots(len(groups), 3, squeeze=False, sharex="col", sharey="col")
    labels = {name: row_label(section, name) for name in names}
    margins(figure, 0.4, 0.5 + text_width(figure, labels.values(), 6), 0.36, 0.2, across=0.36, down=0.16)
    ends = [sum(epoch.train_s for epoch in result.epochs) for result in runs.values()]
    firsts = [result.epochs[0].train_s for result in runs.values()]
    logarithmic = max(ends) > LOG_FROM * min(firsts)
    for line, group in zip(panels, groups, strict=True):
        for axes, kind in zip(line, range(3), strict=True):
            for name in names if len(names) <= MOST_BEHIND else ():
                if name not in group:
                    axes.plot(*_curve(runs[name], kind, curve), color=SILVER, lw=0.4, zorder=1)
            _draw_group(axes, [(runs[name], looks[name]) for name in group], kind, curve)
        handles = [
            Line2D([], [], color=look.colour, ls=look.dashes, marker=look.marker, ms=2.8, lw=1.0, label=labels[name])
            for name in group
            for look in (looks[name],)
        ]
        line[-1].legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.05), frameon=False, fontsize=6, handlelength=2.6,
            borderaxespad=0, labelspacing=0.6,
        )  # fmt: skip
    titles, below_them = ("training loss", shown, shown), (part, part, "training time (s)")
    for top, bottom, title, below in zip(panels[0], panels[-1], titles, below_them, strict=True):
        top.set_title(title, pad=4)
        bottom.set_xlabel(below)
    if logarithmic:
        log_axis(panels[0][2], min(firsts) / 1.3, 1.3 * max(ends), 5)
    most = max(epoch.index for result in runs.values() for epoch in result.epochs)
    ticks = [tick for tick in MaxNLocator(5, integer=True).tick_values(1, max(most, 2)) if 1 <= tick <= most]
    for axes in panels[0][:2]:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
    caption = (
        f"Training loss and {shown} of one run of each row (its first seed), per {part} and over training "
        f"time (validation{' and building a feature cache' if section.ranked else ''} left out)."
    )
    if any(result.best_epoch for result in runs.values()):
        caption += " The large open marker is the epoch whose weights are tested."
    if len(groups) > 1:
        grey = "; grey: all others" if len(names) <= MOST_BEHIND else ""
        caption += f" {PER_LINE} rows a line, in the order of the tables{grey}."
    further = [name for name, result in runs.items() if any(len(epoch.losses) > 1 for epoch in result.epochs)]
    if further:
        caption += f" With further terms in their loss, so not on the scale of the others: {', '.join(further)}."
    if logarithmic:
        caption += " The axis of time is logarithmic."
    return Plot("learning", "Learning curves", caption, figure)


def _draw_group(axes: Any, runs: Sequence[tuple[CellResult, Look]], kind: int, name: str) -> None:
    for result, look in runs:
        x, y = _curve(result, kind, name)
        axes.plot(
            x, y, color=look.colour, ls=look.dashes, lw=1.0, marker=look.marker, ms=2.2, mew=0,
            markevery=math.ceil(len(x) / 10), zorder=3,
        )  # fmt: skip
        best = [place for place, epoch in enumerate(result.epochs) if epoch.index == result.best_epoch]
        if kind and best:
            axes.plot(x[best], y[best], look.marker, ms=5, mfc="white", mec=look.colour, mew=0.9, zorder=4)


def _curve(result: CellResult, kind: int, name: str) -> tuple[Any, Any]:
    """Points of a row in one of the three panels: ``x`` and ``y``, shape ``(epochs,)``."""
    epochs = result.epochs
    x = np.cumsum([epoch.train_s for epoch in epochs]) if kind == 2 else np.array([epoch.index for epoch in epochs])
    return x, np.array([validation(epoch, name) if kind else epoch.loss for epoch in epochs], dtype=float)  # None: NaN
