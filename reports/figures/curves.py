"""Figures of samples inside a cell: memory over time by phase, and training step times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.collections import PolyCollection
from matplotlib.ticker import FixedLocator, MaxNLocator

from tpme.bench.quantities import byte_unit
from tpme.bench.record import CellResult
from tpme.reports.data.load import Array, Samples, load_samples, stretches, thin
from tpme.reports.data.section import Section
from tpme.reports.figures.shares import phase_colours, phase_legend
from tpme.reports.figures.style import (
    BLUE,
    COLUMN_INCHES,
    GREY,
    LOG_FROM,
    SILVER,
    Plot,
    log_axis,
    margins,
    name_rows,
    new_figure,
    row_label,
)


@dataclass(frozen=True)
class Sampled:
    """A cell and its samples."""

    result: CellResult
    samples: Samples


def memory_over_time(section: Section) -> Plot | None:
    """Memory curves of one cell of every row (its first seed) in small panels, coloured by phase.

    Panels share the memory axis but not the time axis: on that of a cell of hours, one of seconds would be a line.
    """
    cells = _first_cells(section)
    drawn = {name: curve for name, cell in cells.items() if len((curve := thin(cell.samples))[0])}
    if not drawn:
        return None
    colours = phase_colours(section)
    across = min(3, len(drawn))
    down = math.ceil(len(drawn) / across)
    lines = math.ceil(len(set(colours.values())) / 4)
    height = 0.5 + 0.13 * lines + (0.9 if down < 5 else 0.8) * down
    figure = new_figure(COLUMN_INCHES, height)
    panels = figure.subplots(down, across, squeeze=False)
    highest = pd.Series({name: used.max() for name, (_, used) in drawn.items()})
    unit, scale = byte_unit(highest)
    top = 1.08 * highest.max() / scale
    ticks = [value for value in MaxNLocator(3).tick_values(0, top) if 0 <= value <= top]
    full = next((name for name in drawn if section.summary.loc[name, "method"] == "fft"), None)
    for axes, (name, (time_s, used)) in zip(panels.flat, drawn.items(), strict=False):
        if full is not None and name != full:
            axes.axhline(highest[full] / scale, color=GREY, lw=0.5, ls=(0, (2, 2)), zorder=3)
        _draw_memory(
            axes, time_s, used / scale, stretches(cells[name].result, lambda phase: colours.get(phase.kind, SILVER))
        )
        axes.set_ylim(0, top)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.tick_params(length=2, pad=2, labelleft=axes in panels[:, 0])
        axes.set_title(_panel_title(section, name), pad=2, fontsize=6, y=1)
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    phase_legend(figure, colours)
    figure.supxlabel("seconds since the start of the cell", fontsize=7, y=0.04 / height)
    figure.supylabel(f"memory ({unit})", fontsize=7, x=0.01)
    margins(figure, 0.42, 0.08, 0.33, 0.2 + 0.13 * lines, across=0.16, down=0.3)
    caption = (
        "Memory over the run of one cell of each row (its first seed), coloured by phase; each panel has its own time "
        "axis. The curve includes the baseline, which M leaves out."
    )
    if full is not None:
        caption += f" Dashed: the peak of {full}."
    return Plot("memory-time", "Memory over time", caption, figure)


def step_times(section: Section) -> Plot | None:
    """Distribution of training step times of one cell of every row, without warm-up epochs."""
    cells = _first_cells(section)
    times = {name: steps for name, cell in cells.items() if len(steps := _steady_steps(cell))}
    if not times:
        return None
    figure = new_figure(COLUMN_INCHES, 0.5 + 0.17 * len(times))
    axes = figure.add_subplot()
    position = name_rows(figure, axes, [row_label(section, name) for name in times], top=0.05)
    drawn = axes.boxplot(
        [1000 * steps for steps in times.values()], positions=position, manage_ticks=False,
        orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False, patch_artist=True,
    )  # fmt: skip
    for box in drawn["boxes"]:
        box.set(facecolor=BLUE, alpha=0.35, linewidth=0.5)
    for line in (*drawn["medians"], *drawn["whiskers"], *drawn["caps"]):
        line.set(color="black", linewidth=0.6)
    axes.set_xlabel("training step (ms)")
    caption = (
        "Training steps of one cell of each row (its first seed) after the warm-up epochs: median, quartiles, "
        "5th to 95th percentile."
    )
    reach = np.array([np.percentile(1000 * steps, (5, 50, 95)) for steps in times.values()])
    if reach[:, 1].max() > LOG_FROM * reach[:, 1].min():
        log_axis(axes, reach.min() / 1.2, 1.2 * reach.max(), 6)
        caption += " The axis is logarithmic."
    return Plot("step-times", "Step times", caption, figure)


# --- parts ---------------------------------------------------------------------------------------------------


def _first_cells(section: Section) -> dict[str, Sampled]:
    """The first seed of every row with its samples, if it has any."""
    firsts = section.firsts(sampled=True)
    return {name: Sampled(cell.result, load_samples(str(cell.beside("samples")))) for name, cell in firsts.items()}


def _draw_memory(axes: Any, time_s: Array, used: Array, coloured: Sequence[tuple[str, float, float]]) -> None:
    """The curve, the area under it coloured by phase, and a time axis with few ticks that ends with the cell."""
    areas, fills = [], []
    for colour, start_s, end_s in coloured:
        start_s, end_s = max(start_s, time_s[0]), min(end_s, time_s[-1])
        if start_s < end_s:
            inside = (time_s > start_s) & (time_s < end_s)
            along = np.concatenate([[start_s], time_s[inside], [end_s]])
            above = np.column_stack([along, np.interp(along, time_s, used)])
            areas.append(np.vstack([(start_s, 0), above, (end_s, 0)]))
            fills.append(colour)
    axes.add_collection(PolyCollection(areas, facecolors=fills, linewidths=0), autolim=False)
    axes.plot(time_s, used, color="black", lw=0.4)
    end = float(time_s[-1])
    axes.set_xlim(0, end)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, end)
    last = max(tick for tick in ticks if tick <= 0.93 * end)  # nearer to the end it would touch the next panel's 0
    axes.set_xticks([0, last], ["0", f"{last:g}"])


def _panel_title(section: Section, name: str, most: int = 20) -> str:
    """The name of a row above a narrow panel, shortened to leave room for marks."""
    beyond = len(row_label(section, name, len(name))) - len(name)
    return row_label(section, name, max(most - beyond, 8))


def _steady_steps(cell: Sampled) -> Array:
    steady = cell.samples.step_epoch > cell.result.warmup_epochs
    return cell.samples.step_s[steady] if steady.any() else cell.samples.step_s
