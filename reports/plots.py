"""The figures of a report, each drawn from a ``Section`` alone: quality against TPME, costs, memory, step times.

Rows that carry a footnote have a ``*`` behind their name; the footnotes stand under the tables.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tpme.reports import shares
from tpme.reports.fields import byte_unit, millions
from tpme.reports.figure import Plot, row_label
from tpme.reports.labels import halo, place_labels
from tpme.reports.load import Array, Samples, load_samples
from tpme.reports.section import Section
from tpme.reports.style import (
    BLUE,
    COLUMN_INCHES,
    GREEN,
    GREY,
    ORANGE,
    SILVER,
    VERMILION,
    margins,
    new_figure,
    style,
    text_width,
)
from tpme.reports.table import number
from tpme.reports.tpme import pareto

LOG_FROM = 20
"""A bar axis is logarithmic where the largest value is so many times the smallest."""


Maker = Callable[[Section], Plot | None]


def makers() -> tuple[Maker, ...]:
    """What draws the figures of a report, in their order."""
    return quality_tpme, shares.ranks, shares.weights, costs, shares.phases, memory_over_time, step_times


def all_plots(section: Section) -> list[Plot]:
    """Every figure there is something to show in."""
    return [plot for make in makers() if (plot := made(make, section)) is not None]


def made(make: Maker, section: Section) -> Plot | None:
    """One figure in the common look, its caption complete; None where there is nothing to show."""
    with style():
        plot = make(section)
    return None if plot is None else replace(plot, caption=f"{plot.caption}{_out_of_memory(section)}")


def _out_of_memory(section: Section) -> str:
    """The rows that ran out of memory, for every caption: a figure of quality or time has no place for them."""
    unit, scale = byte_unit(section.summary["memory_seen_bytes"])
    rows = section.summary[section.summary["status"] == "oom"]
    least = {name: number(seen / scale) for name, seen in rows["memory_seen_bytes"].items() if pd.notna(seen)}
    told = [f"{name}, M ≥ {least[name]} {unit}" if name in least else str(name) for name in rows.index]
    return f" Out of memory: {'; '.join(told)}." if told else ""


def quality_tpme(section: Section) -> Plot | None:
    """Recall@10 against TPME with intervals; the Pareto front is marked. None for fewer than two rows."""
    summary = section.summary
    shown = summary[summary["tpme"].notna() & summary["recall_10"].notna()]
    if len(shown) < 2:
        return None
    figure = new_figure(COLUMN_INCHES, 3.1 + 0.03 * len(shown))
    axes = figure.add_subplot()
    x, y = 100 * shown["tpme"], shown["recall_10"]
    front = pareto(shown)
    reach = np.stack([y - shown["recall_10_low"], shown["recall_10_high"] - y]).clip(min=0)
    axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=SILVER, elinewidth=0.5, zorder=1)
    line = shown[front].sort_values("tpme")
    axes.step(100 * line["tpme"], line["recall_10"], where="post", color=VERMILION, lw=0.8, zorder=2)
    axes.plot(x[~front], y[~front], "o", ms=3.5, color=BLUE, zorder=3, label="dominated")
    axes.plot(x[front], y[front], "D", ms=3.5, color=VERMILION, zorder=3, label="Pareto front")
    axes.set_xlabel("TPME (%), lower is better")
    axes.set_ylabel("Recall@10, higher is better")
    axes.margins(x=0.12, y=0.1)
    right, lines = _draw_references(section, axes, shown)
    margins(figure, 0.55, 0.05 + right, 0.36 + 0.12 * lines, 0.28)
    figure.legend(loc="upper left", ncols=2, frameon=False, fontsize=6)
    order = np.lexsort((y, x))
    place_labels(axes, [(x.iloc[i], y.iloc[i]) for i in order], [row_label(section, shown.index[i]) for i in order])
    caption = (
        "Recall@10 with 95 % intervals over users against TPME; up and left is better. Diamonds: no other row is "
        "better in both. Dotted lines: rows without a TPME, those far below named at the foot."
    )
    return Plot("quality-tpme", "Quality against TPME", _with_warning(section, caption), figure)


def costs(section: Section) -> Plot | None:
    """Bars of T, P and M side by side, relative to full fine-tuning where it is there."""
    unit, scale = byte_unit(section.summary["memory_seen_bytes"])
    columns = (
        ("epoch_time_s", "T", "s", 1.0, BLUE),
        ("trainable_millions", "P", "M", 1.0, ORANGE),
        ("memory_bytes", "M", unit, scale, GREEN),
    )
    summary = section.summary
    bounded = (summary["status"] == "oom") & summary["memory_seen_bytes"].notna()
    summary = summary.assign(memory_bytes=summary["memory_bytes"].where(~bounded, summary["memory_seen_bytes"]))
    shown = summary[summary[[name for name, *_ in columns]].notna().any(axis=1)]
    if shown.empty:
        return None
    full = shown[(shown["method"] == "fft") & (shown["status"] == "ok")].head(0 if section.group.mixed else 1)
    figure = new_figure(COLUMN_INCHES, 0.6 + 0.17 * len(shown))
    panels = figure.subplots(1, 3, sharey=True)
    position = np.arange(len(shown))[::-1]
    for axes, (name, symbol, per, divisor, colour) in zip(panels, columns, strict=True):
        values = shown[name].astype(float) / divisor
        base = float(full[name].iloc[0]) / divisor if len(full) and full[name].iloc[0] > 0 else None
        relative = values / base if base else values
        least = (bounded[shown.index] & (name == "memory_bytes")).to_numpy()
        show = millions if symbol == "P" else number
        texts = [f"≥ {show(value)}" if bound else show(value) for value, bound in zip(values, least, strict=True)]
        _bars(axes, position, relative, texts, least, colour)
        axes.set_title(f"{symbol} ({per})", pad=3)
        axes.set_xlabel("× FFT" if base else per, labelpad=1)
        if base:
            axes.axvline(1, color=GREY, lw=0.5, ls=(0, (2, 2)), zorder=0)
    _name_rows(figure, panels[0], position, [row_label(section, name) for name in shown.index])
    caption = "Epoch time T, trainable parameters P and peak memory M; the numbers are the raw values, lower is better."
    if len(full):
        caption += f" Bars are relative to {full.index[0]}, the dashed line."
    if bounded.any():
        caption += " Hatched: out of memory, so M is at least this."
    return Plot("costs", "Time, parameters and memory", caption, figure)


def memory_over_time(section: Section) -> Plot | None:
    """The memory curve of one cell of every row (its first seed), a small panel each, all on the same axes."""
    curves = {name: one for name, one in _first_samples(section).items() if len(one.sample_t_s)}
    if not curves:
        return None
    across = min(3, len(curves))
    down = math.ceil(len(curves) / across)
    figure = new_figure(COLUMN_INCHES, 0.45 + 0.85 * down)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    largest = pd.Series([one.sample_bytes.max() for one in curves.values()])
    unit, scale = byte_unit(largest)
    full = next((name for name in curves if section.summary.loc[name, "method"] == "fft"), None)
    drawn = {name: thin(one) for name, one in curves.items()}
    for axes, name in zip(panels.flat, drawn, strict=False):
        if full is not None and name != full:
            axes.plot(drawn[full][0], drawn[full][1] / scale, color=SILVER, lw=0.8)
        time_s, used = drawn[name][0], drawn[name][1] / scale
        axes.fill_between(time_s, used, color=BLUE, alpha=0.25, lw=0)
        axes.plot(time_s, used, color=BLUE, lw=0.8)
        axes.set_title(row_label(section, name, 18), pad=2, fontsize=6)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    panels.flat[0].set_ylim(0, 1.08 * largest.max() / scale)
    lengths = [float(one.sample_t_s.max()) for one in curves.values()]
    panels.flat[0].set_xlim(0, max(lengths))
    if max(lengths) > LOG_FROM * min(lengths) > 0:
        panels.flat[0].set_xlim(min(lengths) / 10, max(lengths))
        _log_axis(panels.flat[0])
    figure.supxlabel("seconds since the start of the cell", fontsize=7, y=0.05 / figure.get_figheight())
    figure.supylabel(f"memory ({unit})", fontsize=7, x=0.01)
    margins(figure, 0.42, 0.08, 0.38, 0.16, across=0.12, down=0.26)
    caption = (
        "Memory over the life of one cell of each row (its first seed), all panels on the same axes; all that is in "
        "use is shown, the baseline included, which M leaves out."
    )
    if full is not None:
        caption += f" Grey: {full}."
    return Plot("memory-time", "Memory over time", caption, figure)


def step_times(section: Section) -> Plot | None:
    """Distribution of the training step times of one cell of every row, warm-up epochs left out."""
    times = {name: _steady_steps(section, name, one) for name, one in _first_samples(section).items()}
    times = {name: steps for name, steps in times.items() if len(steps)}
    if not times:
        return None
    figure = new_figure(COLUMN_INCHES, 0.5 + 0.17 * len(times))
    axes = figure.add_subplot()
    position = np.arange(len(times))[::-1]
    drawn = axes.boxplot(
        [1000 * steps for steps in times.values()],
        positions=position, orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False, patch_artist=True,
    )  # fmt: skip
    for box in drawn["boxes"]:
        box.set(facecolor=BLUE, alpha=0.35, linewidth=0.5)
    for line in (*drawn["medians"], *drawn["whiskers"], *drawn["caps"]):
        line.set(color="black", linewidth=0.6)
    middle = [float(np.median(steps)) for steps in times.values()]
    if max(middle) > LOG_FROM * min(middle):
        _log_axis(axes, 6)
    _name_rows(figure, axes, position, [row_label(section, name) for name in times], top=0.05)
    axes.set_xlabel("training step (ms)")
    caption = (
        "Training steps of one cell of each row (its first seed) after the warm-up epochs: median, quartiles, "
        "5th to 95th percentile."
    )
    return Plot("step-times", "Step times", caption, figure)


# --- parts ---------------------------------------------------------------------------------------------------


def _bars(
    axes: Any, position: Array, relative: pd.Series[float], texts: list[str], lower_bound: Array, colour: str
) -> None:
    """Horizontal bars with the raw value behind each; logarithmic where the values lie far apart."""
    positive = relative[relative > 0]
    logarithmic = len(positive) > 1 and positive.max() > LOG_FROM * positive.min()
    start = 10 ** math.floor(math.log10(positive.min() * 0.7)) if logarithmic else 0.0
    if logarithmic:
        _log_axis(axes)
    width = (relative.where(relative > 0, np.nan) - start).to_numpy()
    drawn = axes.barh(position, np.nan_to_num(width), left=start, height=0.68, color=colour, lw=0)
    for bar, bounded in zip(drawn, lower_bound, strict=True):
        if bounded:
            bar.set(hatch="/////", fill=False, edgecolor=colour, linewidth=0.5)
    top = positive.max() if len(positive) else 1.0
    axes.set_xlim(start, start * (top / start) ** 1.55 if logarithmic else top * 1.55)
    for y, share, text in zip(position, relative, texts, strict=True):
        axes.annotate(
            text, (share if share > 0 else start, y), xytext=(1.5, 0), textcoords="offset points", fontsize=5.5,
            va="center", path_effects=halo(),
        )  # fmt: skip
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    if not logarithmic:
        axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_rows(figure: Figure, axes: Any, position: Array, names: list[str], top: float = 0.2) -> None:
    """Names on the left of horizontal bars, with the room they need."""
    axes.set_yticks(position, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    margins(figure, text_width(figure, names, 6.5) + 0.12, 0.05, 0.36, top, across=0.2)


def _log_axis(axes: Any, most: int = 3) -> None:
    """A logarithmic axis with labels at powers of ten, at most so many."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=most))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _power(value: float) -> str:
    """0.01 to 1000 as they are, what is beyond as a short power of ten."""
    if 0.01 <= value <= 1000:
        return f"{value:g}"
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _draw_references(section: Section, axes: Any, shown: pd.DataFrame) -> tuple[float, int]:
    """Recall@10 of the finished rows without a TPME as lines; what is far from the others is told below the axis.

    Returns the room their names need on the right, in inches, and the number of lines below.
    """
    rest = section.summary[section.summary["tpme"].isna() & section.summary["recall_10"].notna()]
    low, high = shown["recall_10_low"].min(), shown["recall_10_high"].max()
    near = (rest["recall_10"] >= low - (high - low) / 2) & (rest["recall_10"] <= high + (high - low) / 2)
    names = {name: row_label(section, str(name)) for name in rest.index}
    lines = rest.loc[near, "recall_10"].sort_values()
    for value in lines:
        axes.axhline(value, color=GREY, lw=0.6, ls=(0, (2, 2)), zorder=0)
    low, high = axes.get_ylim()
    least = 0.035 * (high - low)  # a line of text
    for name, y in zip(lines.index, _apart(list(lines), least), strict=True):
        axes.annotate(
            names[name], (1, y), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
            fontsize=6, color=GREY, va="center", annotation_clip=False,
        )  # fmt: skip
    far = [f"{names[name]} {value:.3f}" for name, value in rest.loc[~near, "recall_10"].items()]
    below = textwrap.wrap(f"off the scale: {', '.join(far)}", 60) if far else []
    axes.set_xlabel("\n".join([axes.get_xlabel(), *below]))
    return text_width(axes.figure, [names[name] for name in rest.index[near]], 6), len(below)


def _apart(values: list[float], least: float) -> list[float]:
    """Ascending values, pushed up where needed until neighbours are ``least`` apart."""
    spread: list[float] = []
    for value in values:
        spread.append(max(value, spread[-1] + least) if spread else value)
    return spread


def _with_warning(section: Section, caption: str) -> str:
    """A quality figure repeats what the flags of all rows say."""
    return " ".join([caption, *(text if text.endswith(".") else f"{text}." for text in section.notes.shared)])


def _first_samples(section: Section) -> dict[str, Samples]:
    """Samples of the first seed of every row, a finished one where there is one."""
    cells = section.cells[section.cells["selected"] & section.cells["samples_path"].notna()]
    cells = cells.assign(failed=cells["status"] != "ok").sort_values(["failed", "seed", "path"])
    first = cells.drop_duplicates("row").set_index("row")["samples_path"]
    return {str(name): load_samples(first[name]) for name in section.summary.index if name in first.index}


def thin(one: Samples, most: int = 400) -> tuple[Array, Array]:
    """Time and memory of at most so many samples; of neighbours the largest stays, so no peak is lost."""
    stride = math.ceil(len(one.sample_bytes) / most)
    starts = np.arange(0, len(one.sample_bytes), stride)
    ends = np.minimum(starts + stride, len(one.sample_bytes)) - 1
    return one.sample_t_s[ends], np.maximum.reduceat(one.sample_bytes, starts)


def _steady_steps(section: Section, name: str, one: Samples) -> Array:
    cells = section.cells[section.cells["row"] == name]
    steady = one.step_epoch > int(cells["warmup_epochs"].iloc[0])
    steps = one.step_s[steady] if steady.any() else one.step_s
    return steps[np.isfinite(steps) & (steps > 0)]
