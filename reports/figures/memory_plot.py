"""The figure of memory over time: a panel for every row, on the scale of M and of the whole-run peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from tpme.bench.quantities import byte_unit, memory_reading, number
from tpme.bench.record import CellResult
from tpme.bench.side_files import Samples, load_samples
from tpme.reports.data.columns import OWN_PHASES
from tpme.reports.data.load import Array, stretches, thin
from tpme.reports.data.phase_colours import PHASE_COLOURS
from tpme.reports.data.section import Section
from tpme.reports.data.trials import lines_of
from tpme.reports.figures.style import (
    PAGE_INCHES,
    Plot,
    margins,
    new_figure,
    phase_legend,
    phase_letters,
    phase_look,
    row_label,
    text_width,
)

BESIDE_INCHES = 0.6
"""Room on the right of a panel for the names of its marks."""
LINE_PT = 7.0
"""Height of a line of those names."""


@dataclass(frozen=True)
class Curve:
    """Memory of one run over time, over what was in use before data and model were loaded, as M counts."""

    result: CellResult
    time_s: Array
    used_bytes: Array
    memory_bytes: float
    """M of this run; NaN where it is unknown, like the next one."""
    peak_bytes: float
    peak_phase: str | None


def memory_over_time(section: Section) -> Plot | None:
    """Memory curves of one run of every row (its first seed), the area below them coloured by phase.

    Panels share the memory axis but not the time axis: on that of a run of hours, one of seconds would be a line.
    """
    curves = _curves(section)
    if not curves:
        return None
    across = min(2 if len(curves) <= 12 else 3, len(curves))
    down = math.ceil(len(curves) / across)
    tall = 1.25 if across < 3 else 1.05
    height = 0.62 + 0.13 * math.ceil(len(PHASE_COLOURS) / 8) + (tall + 0.36) * down
    figure = new_figure(PAGE_INCHES if across > 1 else PAGE_INCHES / 2, height)
    panels = figure.subplots(down, across, squeeze=False)
    kinds = {phase.kind for curve in curves.values() for phase in curve.result.phases}
    top = 0.2 + phase_legend(figure, kinds, 10 if across > 1 else 5)
    margins(figure, 0.42, BESIDE_INCHES, 0.36, top + 0.12, across=BESIDE_INCHES + 0.12, down=0.36)
    highest = max(np.fmax(curve.used_bytes.max(), curve.peak_bytes) for curve in curves.values())
    unit, scale = byte_unit([highest])
    limit = 1.06 * highest / scale
    ticks = [value for value in MaxNLocator(4).tick_values(0, limit) if 0 <= value <= limit]
    for axes, (name, curve) in zip(panels.flat, curves.items(), strict=False):
        axes.set_ylim(0, limit)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.tick_params(length=2, pad=2, labelleft=axes in panels[:, 0])
        axes.set_title(row_label(section, name), pad=3, loc="left", fontsize=7, y=1)
        _draw_curve(axes, curve, scale)
        _draw_marks(axes, curve, scale)
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    _mark_legend(figure, top)
    figure.supxlabel("seconds since the start of the run", fontsize=7, y=0.05 / height)
    figure.supylabel(f"memory ({unit})", fontsize=7, x=0.04 / figure.get_figwidth())
    caption = (
        "Memory over one run of each row (its first seed), coloured by phase. All panels have one memory axis, which "
        "begins at what was in use before data and model were loaded, as M does; each has its own time axis. Marked "
        "are M and the peak of this run with its phase; tables have the mean of M and the highest peak over the seeds."
    )
    if OWN_PHASES & kinds:
        caption += f" The suite's own measurements ({', '.join(sorted(OWN_PHASES & kinds))}) count for neither."
    elsewhere = [name for name, curve in curves.items() if _is_elsewhere(curve)]
    if elsewhere:
        caption += f" Another run built the cache, and so reached the peak, of {', '.join(elsewhere)}."
    return Plot("memory-time", "Memory over time", caption, figure)


# --- parts ---------------------------------------------------------------------------------------------------


def _curves(section: Section) -> dict[str, Curve]:
    """The curve of the first seed of every row that left one."""
    curves = {}
    cells = {cell["path"]: cell for cell in lines_of(section.cells)}
    for name, recorded in section.firsts(sampled=True).items():
        samples = load_samples(str(recorded.beside("samples")))
        time_s, used = thin(samples, 800)
        if len(used):
            above = (used - _held_before(recorded.result, samples)).clip(min=0)
            cell = cells[str(recorded.path)]
            # None, not NaN, where no cell of the section has one
            memory, peak = (math.nan if cell[key] is None else cell[key] for key in ("memory_bytes", "peak_bytes"))
            curves[name] = Curve(recorded.result, time_s, above, memory, peak, cell["peak_phase"])
    return curves


def _held_before(result: CellResult, samples: Samples) -> float:
    """What was in use before data and model were loaded: by how much the samples lie above the readings of M.

    Records do not hold it. In a long phase both see the same peak, so the median over the phases of training (over
    all, where nothing was trained) is exact to the sampler's interval; 0 where no phase has both.
    """
    above: dict[bool, list[float]] = {True: [], False: []}
    for phase in result.phases:
        inside = (samples.sample_t_s >= phase.start_s) & (samples.sample_t_s <= phase.start_s + phase.wall_s)
        sampled = samples.sample_bytes[inside & np.isfinite(samples.sample_bytes)]
        read = memory_reading("memory_bytes", phase.memory, result.cell.device).value
        if len(sampled) and read is not None:
            above[phase.kind == "train"].append(sampled.max() - read)
    differences = above[True] or above[False]
    return max(float(np.median(differences)), 0.0) if differences else 0.0


def _draw_curve(axes: Any, curve: Curve, scale: float) -> None:
    """The curve, the area under it by phase, the name of each phase where it fits, and the time axis."""
    time_s, used = curve.time_s, curve.used_bytes / scale
    end = float(time_s[-1])
    areas: dict[str, list[Array]] = {}
    widest: dict[str, tuple[float, float]] = {}
    for kind, start_s, end_s in stretches(curve.result, lambda phase: phase.kind):
        start_s, end_s = max(start_s, time_s[0]), min(end_s, end)
        if start_s < end_s:
            inside = (time_s > start_s) & (time_s < end_s)
            along = np.concatenate([[start_s], time_s[inside], [end_s]])
            above = np.column_stack([along, np.interp(along, time_s, used)])
            areas.setdefault(kind, []).append(np.vstack([(start_s, 0), above, (end_s, 0)]))
            widest[kind] = max(widest.get(kind, (0.0, 0.0)), (end_s - start_s, start_s))
    for kind, polygons in areas.items():
        look = {key: value for key, value in phase_look(kind).items() if key != "linewidth"}
        axes.add_collection(PolyCollection(polygons, linewidths=0, label=kind, **look), autolim=False)
    axes.plot(time_s, used, color="black", lw=0.5)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    inches = axes.get_position().width * axes.figure.get_figwidth() / end
    for kind, (long, start_s) in widest.items():
        half = text_width(axes.figure, [kind], 6) / inches / 2 + 0.02 / inches
        places = start_s + np.linspace(half, long - half, 15) if long > 2 * half else np.empty(0)
        rooms = [np.interp(np.linspace(place - half, place + half, 9), time_s, used).min() for place in places]
        if rooms and max(rooms) > 0.15 * axes.get_ylim()[1]:
            place = min(places[np.array(rooms) > 0.9 * max(rooms)], key=lambda place: abs(place - start_s - long / 2))
            axes.annotate(
                kind, (place, 0), xytext=(0, 4), textcoords="offset points", fontsize=6, ha="center",
                va="bottom", color=phase_letters(kind),
            )  # fmt: skip


def _draw_marks(axes: Any, curve: Curve, scale: float) -> None:
    """Lines at M, over the training phases, and at the peak of the run, with their names on the right."""
    memory, peak = curve.memory_bytes / scale, curve.peak_bytes / scale
    marks = []
    same = abs(peak - memory) < 0.005 * peak
    trained = [phase for phase in curve.result.phases if phase.kind == "train"] or curve.result.phases
    if math.isfinite(memory) and trained:
        end_s = max(phase.start_s + phase.wall_s for phase in trained)
        axes.hlines(memory, min(phase.start_s for phase in trained), end_s, color="black", lw=1.1, zorder=4)
        marks.append((memory, f"M and peak\n{number(memory)}" if same else f"M {number(memory)}", 1 + same))
    if math.isfinite(peak):
        axes.axhline(peak, color="black", lw=0.9, ls=(0, (1, 1.5)), zorder=4)
        marks += [] if same else [(peak, f"peak {number(peak)}\nin {curve.peak_phase}", 2)]
    line_high = LINE_PT / 72 / (axes.get_position().height * axes.figure.get_figheight()) * axes.get_ylim()[1]
    above = 0.0  # upper end of the name below
    for value, text, lines in sorted(marks):
        middle = max(value, above + lines * line_high / 2)
        above = middle + lines * line_high / 2
        axes.annotate(
            text, (1, middle), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            fontsize=6, va="center", annotation_clip=False, linespacing=1.05,
        )  # fmt: skip


def _mark_legend(figure: Figure, top: float) -> None:
    """What the two lines of a panel are, below the legend of the phases."""
    handles = [
        Line2D([], [], color="black", lw=1.1, label="M: peak while training"),
        Line2D([], [], color="black", lw=0.9, ls=(0, (1, 1.5)), label="peak of the whole run"),
    ]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1 - (top - 0.2) / figure.get_figheight()), ncols=2,
        frameon=False, fontsize=6, handlelength=2, borderaxespad=0,
    )  # fmt: skip


def _is_elsewhere(curve: Curve) -> bool:
    """Whether the peak lies in the building of a cache that this run did not build."""
    return curve.peak_phase == "cache" and not any(phase.kind == "cache" for phase in curve.result.phases)
