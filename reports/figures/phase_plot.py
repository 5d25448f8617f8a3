"""The figure of wall time by phase: shares, with the seconds written in them and beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpme.bench.quantities import number
from tpme.reports.data.phase_colours import PHASE_COLOURS
from tpme.reports.data.phase_times import phase_times
from tpme.reports.data.section import Section
from tpme.reports.figures.style import (
    PAGE_INCHES,
    Plot,
    name_rows,
    new_figure,
    phase_legend,
    phase_letters,
    phase_look,
    row_label,
)

WRITTEN = 5.0
"""Smallest share (percent) in which its seconds are written."""


def phases(section: Section) -> Plot | None:
    """Wall time of the runs of every row by phase: stacked shares with seconds, in the order of a run."""
    times = phase_times(section)
    seconds = times[[f"{kind}_s" for kind in PHASE_COLOURS if f"{kind}_s" in times]].fillna(0.0)
    seconds.columns = [name.removesuffix("_s") for name in seconds.columns]
    if not seconds.to_numpy().sum() > 0:
        return None
    total = seconds.sum(axis=1)
    share = 100 * seconds.div(total, axis=0)
    figure = new_figure(PAGE_INCHES, 0.75 + 0.17 * len(share))
    axes = figure.add_subplot()
    top = 0.14 + phase_legend(figure, seconds.columns, 10)
    figure.set_figheight(0.46 + top + 0.17 * len(share))
    names = [row_label(section, str(name)) for name in share.index]
    position = name_rows(figure, axes, names, right=0.55, top=top)
    left = np.zeros(len(share))
    for kind in map(str, share):
        width = share[kind].to_numpy()
        axes.barh(position, width, left=left, height=0.72, **phase_look(kind))
        for y, start, wide, spent in zip(position, left, width, seconds[kind], strict=True):
            if wide >= WRITTEN:
                axes.text(
                    start + wide / 2, y, number(spent), fontsize=5.5, ha="center", va="center_baseline",
                    color=phase_letters(kind),
                    bbox={"boxstyle": "square,pad=0.15", "facecolor": PHASE_COLOURS[kind], "linewidth": 0},
                )  # fmt: skip
        left += width
    beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": 6, "annotation_clip": False}
    for y, spent in zip(position, total, strict=True):
        axes.annotate(f"{number(spent)} s", (100, y), va="center_baseline", **beside)
    axes.annotate("in all", (100, position[0] + 0.55), va="bottom", **beside)
    axes.set_xlim(0, 100)
    axes.grid(False, axis="y")
    axes.set_xlabel("share of the run's wall time (%)")
    caption = (
        "Where the wall time of a run goes, from left to right in the order of a run, mean over the seeds. Numbers are "
        f"seconds: of a phase (from a share of {WRITTEN:g} % on), and of the whole run on the right."
    )
    if "cache" in seconds:
        caption += " The run that finds no feature cache builds it for all."
    return Plot("phases", "Wall time by phase", caption, figure)
