"""The list of a report's figures, each drawn from a ``Section``, and two of them: quality against TPME, and costs.

Rows with a footnote have a ``*`` behind their name; the footnotes are below the tables.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from tpme.bench.quantities import byte_unit, number, quantity
from tpme.reports.data.section import Section
from tpme.reports.data.tpme import pareto
from tpme.reports.figures import curves, shares
from tpme.reports.figures.bars import bars
from tpme.reports.figures.labels import place_labels
from tpme.reports.figures.serving_plot import inference
from tpme.reports.figures.style import (
    BLUE,
    COLUMN_INCHES,
    GREEN,
    GREY,
    ORANGE,
    SILVER,
    VERMILION,
    Plot,
    margins,
    name_rows,
    new_figure,
    row_label,
    style,
    text_width,
)

Maker = Callable[[Section], Plot | None]


def makers() -> tuple[Maker, ...]:
    """The functions that draw the figures of a report, in order."""
    return (
        quality_tpme, shares.ranks, shares.weights, costs, inference, shares.phases, curves.memory_over_time,
        curves.step_times,
    )  # fmt: skip


def make_plot(make: Maker, section: Section) -> Plot | None:
    """One figure in the common style with its complete caption; None without data."""
    with style():
        plot = make(section)
    if plot is None:
        return None
    marked = " *: the row has a footnote under the table of results." if any(section.notes.marks.values()) else ""
    return replace(plot, caption=f"{plot.caption}{_out_of_memory(section)}{marked}")


def _out_of_memory(section: Section) -> str:
    """Names the rows that ran out of memory in every caption: figures of quality or time cannot show them."""
    unit, scale = byte_unit(section.summary["memory_seen_bytes"])
    rows = section.summary[section.summary["status"] == "oom"]
    least = {name: number(seen / scale) for name, seen in rows["memory_seen_bytes"].items() if pd.notna(seen)}
    parts = [f"{name}, M ≥ {least[name]} {unit}" if name in least else str(name) for name in rows.index]
    return f" Out of memory: {'; '.join(parts)}." if parts else ""


def quality_tpme(section: Section) -> Plot | None:
    """Recall@10 against TPME with intervals; the Pareto front is marked. None for fewer than two rows."""
    summary = section.summary
    rows = summary[summary["tpme"].notna() & summary["recall_10"].notna()]
    if len(rows) < 2:
        return None
    figure = new_figure(COLUMN_INCHES, 3.0 + 0.04 * len(rows))
    axes = figure.add_subplot()
    x, y = 100 * rows["tpme"], rows["recall_10"]
    front = pareto(rows)
    reach = np.stack([y - rows["recall_10_low"], rows["recall_10_high"] - y]).clip(min=0)
    axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=SILVER, elinewidth=0.5, zorder=1)
    best = rows[front].sort_values("tpme")
    corners = np.repeat(np.column_stack([100 * best["tpme"], best["recall_10"]]), 2, axis=0)
    steps = np.column_stack([corners[1:, 0], corners[:-1, 1]])
    axes.plot(*steps.T, color=VERMILION, lw=0.8, zorder=2)
    axes.plot(x[~front], y[~front], "o", ms=3.5, color=BLUE, zorder=3, label="dominated")
    axes.plot(x[front], y[front], "D", ms=3.5, color=VERMILION, zorder=3, label="Pareto front")
    axes.set_xlabel("TPME (%), lower is better")
    axes.set_ylabel("Recall@10, higher is better")
    axes.margins(x=0.12, y=0.1)
    rest = summary[summary["tpme"].isna() & summary["recall_10"].notna()]
    beside, far = _references(rest, rows)
    right = _draw_references(section, axes, beside)
    off_scale = [f"{row_label(section, str(name))} {value:.3f}" for name, value in far.items()]
    below = textwrap.wrap(f"off the scale: {', '.join(off_scale)}" if off_scale else "", 60)
    axes.set_xlabel("\n".join([axes.get_xlabel(), *below]))
    margins(figure, 0.55, 0.05 + right, 0.36 + 0.12 * len(below), 0.28)
    figure.legend(loc="upper left", ncols=2, frameon=False, fontsize=6)
    ends = axes.get_xlim()
    unplaced = place_labels(
        axes,
        np.column_stack([x, y]),
        [row_label(section, str(name)) for name in rows.index],
        lines=[*itertools.pairwise(steps), *(((ends[0], y), (ends[1], y)) for y in beside)],
        bars=[*zip(np.column_stack([x, y - reach[0]]), np.column_stack([x, y + reach[1]]), strict=True)],
    )
    caption = (
        "Recall@10 with 95 % intervals over users against TPME; up and left is better. Diamonds: no other row is "
        "better in both."
    )
    if len(beside):
        caption += " Dotted lines: rows without a TPME."
    if len(far):
        caption += " Those far from the others are named at the foot."
    if unplaced:
        caption += f" No room for {', '.join(unplaced)}."
    shared = (text if text.endswith(".") else f"{text}." for text in section.notes.shared)
    return Plot("quality-tpme", "Quality against TPME", " ".join([caption, *shared]), figure)


def costs(section: Section) -> Plot | None:
    """Bars of T, P and M side by side, relative to full fine-tuning if the section has it."""
    unit, scale = byte_unit(section.summary["memory_seen_bytes"])
    columns = (
        ("epoch_time_s", "T", "s", 1.0, BLUE),
        ("trainable_millions", "P", "M", 1.0, ORANGE),
        ("memory_bytes", "M", unit, scale, GREEN),
    )
    summary = section.summary
    bounded = (summary["status"] == "oom") & summary["memory_seen_bytes"].notna()
    summary = summary.assign(memory_bytes=summary["memory_bytes"].where(~bounded, summary["memory_seen_bytes"]))
    rows = summary[summary[[name for name, *_ in columns]].notna().any(axis=1)]
    if rows.empty:
        return None
    full = rows[(rows["method"] == "fft") & (rows["status"] == "ok")].head(0 if section.group.mixed else 1)
    figure = new_figure(COLUMN_INCHES, 0.6 + 0.17 * len(rows))
    panels = figure.subplots(1, 3, sharey=True)
    names = [row_label(section, str(name)) for name in rows.index]
    position = name_rows(figure, panels[0], names, across=0.2)
    logarithmic = []
    for axes, (name, symbol, per, divisor, colour) in zip(panels, columns, strict=True):
        values = rows[name].astype(float) / divisor
        base = float(full[name].iloc[0]) / divisor if len(full) and full[name].iloc[0] > 0 else None
        relative = values / base if base else values
        least = (bounded[rows.index] & (name == "memory_bytes")).to_numpy()
        show = quantity(name).format
        texts = [f"≥ {show(value)}" if bound else show(value) for value, bound in zip(values, least, strict=True)]
        logarithmic += [symbol] if bars(axes, position, relative, texts, colour, lower_bound=least) else []
        axes.set_title(f"{symbol} ({per})", pad=3)
        axes.set_xlabel("× FFT" if base else per, labelpad=1)
        if base:
            axes.axvline(1, color=GREY, lw=0.5, ls=(0, (2, 2)), zorder=0)
    caption = "Epoch time T, trainable parameters P and peak memory M; the numbers are the raw values, lower is better."
    if len(full):
        caption += f" Bars are relative to {full.index[0]}, the dashed line."
    if logarithmic:
        caption += f" Logarithmic: {', '.join(logarithmic)}; compare where bars end, not their lengths."
    if bounded.any():
        caption += " Hatched: out of memory, so M is at least this."
    return Plot("costs", "Time, parameters and memory", caption, figure)


# --- parts ---------------------------------------------------------------------------------------------------


def _references(rest: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.Series[float], pd.Series[float]]:
    """Recall@10 of the rows without a TPME, ascending: those that fit on the axis of the others, and the rest."""
    low, high = rows["recall_10_low"].min(), rows["recall_10_high"].max()
    values = rest["recall_10"].sort_values()
    near = values.between(low - (high - low) / 2, high + (high - low) / 2)
    return values[near], values[~near]


def _draw_references(section: Section, axes: Any, values: pd.Series[float]) -> float:
    """A dotted line for each value with its row's name on the right. Returns the width of the names in inches."""
    for value in values:
        axes.axhline(value, color=GREY, lw=0.6, ls=(0, (2, 2)), zorder=0)
    low, high = axes.get_ylim()
    least = 0.035 * (high - low)  # a line of text
    names = [row_label(section, str(name)) for name in values.index]
    for name, y in zip(names, _apart(list(values), least), strict=True):
        axes.annotate(
            name, (1, y), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
            fontsize=6, color=GREY, va="center", annotation_clip=False,
        )  # fmt: skip
    return text_width(axes.figure, names, 6)


def _apart(values: list[float], least: float) -> list[float]:
    """Ascending values, moved up until neighbours are at least ``least`` apart."""
    spread: list[float] = []
    for value in values:
        spread.append(max(value, spread[-1] + least) if spread else value)
    return spread
