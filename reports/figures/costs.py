"""The list of a report's figures, each drawn from a ``Section``, and that of the costs.

Rows with a footnote have a ``*`` behind their name; the footnotes are below the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import pandas as pd

from tpme.bench.quantities import byte_unit, instruments_of, memory_instrument, number, quantity
from tpme.reports.data.load import Array
from tpme.reports.data.others import foot_of_others
from tpme.reports.data.section import Section
from tpme.reports.figures.bars import bars
from tpme.reports.figures.learning import learning_curves
from tpme.reports.figures.memory_plot import memory_over_time
from tpme.reports.figures.phase_plot import phases
from tpme.reports.figures.quality_plot import quality_tpme
from tpme.reports.figures.serving_plot import inference
from tpme.reports.figures.step_plot import step_times
from tpme.reports.figures.style import (
    GREY,
    PAGE_INCHES,
    Plot,
    add_foot,
    name_rows,
    new_figure,
    row_label,
    row_looks,
    style,
)
from tpme.reports.figures.tpme_plot import tpme_intervals
from tpme.reports.figures.weight_plot import weights

MEMORIES = ("memory_bytes", "peak_bytes")

Maker = Callable[[Section], Plot | None]


def makers(sections: Sequence[Section]) -> tuple[Maker, ...]:
    """The functions that draw the figures of a report, in order; a row looks the same in all of its sections."""
    looks = row_looks(chain.from_iterable(section.lines for section in sections))
    return (
        quality_tpme, tpme_intervals, partial(weights, looks=looks), costs, memory_over_time, phases,
        partial(learning_curves, looks=looks), inference, step_times,
    )  # fmt: skip


def make_plot(make: Maker, section: Section) -> Plot | None:
    """One figure in the common style, with who measured if others did and its complete caption; None without data."""
    with style():
        plot = make(section)
        if plot is None:
            return None
        records = [one.result for one in section.records]
        add_foot(plot.figure, foot_of_others(records, mixed="source" in section.group.mixed))
    marked = " *: the row has a footnote under the table of results." if any(section.notes.marks.values()) else ""
    return replace(plot, caption=f"{plot.caption}{_out_of_memory(section)}{marked}")


def _out_of_memory(section: Section) -> str:
    """Names the rows that ran out of memory in every caption: figures of quality or time cannot show them."""
    unit, scale = byte_unit(section.summary["memory_seen_bytes"])
    rows = section.summary[section.summary["status"] == "oom"]
    least = {name: number(seen / scale) for name, seen in rows["memory_seen_bytes"].items() if pd.notna(seen)}
    parts = [f"{name}, M ≥ {least[name]} {unit}" if name in least else str(name) for name in rows.index]
    return f" Out of memory: {'; '.join(parts)}." if parts else ""


def costs(section: Section) -> Plot | None:
    """T, P, M and the whole-run peak side by side with error bars, as multiples of the reference row if there is one.

    For a row that ran out of memory the most that was seen stands for M and the peak.
    """
    unit, scale = byte_unit(section.summary[["memory_seen_bytes", "peak_bytes"]].max(axis=1))
    columns = [
        ("epoch_time_s", f"T, {section.time_of}", "s", 1.0),
        ("trainable_millions", "P, parameters", "M", 1.0),
        ("memory_bytes", _memory_title(section), unit, scale),
        ("peak_bytes", "Peak, whole run", unit, scale),
    ]
    summary = section.summary
    if not section.ranked and summary["peak_bytes"].isna().all():
        columns.pop()
    bounded = (summary["status"] == "oom") & summary["memory_seen_bytes"].notna()
    seen = {name: summary[name].where(~bounded, summary["memory_seen_bytes"]) for name in MEMORIES}
    rows = summary.assign(**seen)[summary[[name for name, *_ in columns]].notna().any(axis=1) | bounded]
    if rows.empty:
        return None
    figure = new_figure(PAGE_INCHES, 0.62 + 0.17 * len(rows))
    panels = figure.subplots(1, len(columns), sharey=True)
    names = [row_label(section, str(name)) for name in rows.index]
    position = name_rows(figure, panels[0], names, across=0.2)
    logarithmic = []
    for axes, (name, title, per, divisor) in zip(panels, columns, strict=True):
        base = 0.0 if section.reference is None else section.lines[section.reference][name]
        size = base if base > 0 else divisor
        least = (bounded[rows.index] & (name in MEMORIES)).to_numpy()
        values = zip(rows[name] / divisor, least, strict=True)
        texts = [f"{'≥ ' if bound else ''}{quantity(name).format(value)}" for value, bound in values]
        if bars(axes, position, rows[name] / size, texts, lower_bound=least, reach=_reach(rows, name) / size):
            logarithmic.append(title.partition(",")[0])
        axes.set_title(f"{title} ({per})", pad=3)
        axes.set_xlabel(f"× {section.reference}" if base > 0 else per, labelpad=1)
        if base > 0:
            axes.axvline(1, color=GREY, lw=0.6, ls=(0, (4, 2)), zorder=0)
    building = ", with building a feature cache" if section.ranked else ""
    caption = (
        "What a row costs; written are the values, lower is better. M is the peak while training alone (so in TPME), "
        f"Peak that of the whole run from loading to export{building}."
    )
    if "source" in section.group.key:
        caption = "What a row costs; written are the values, lower is better. M is what its source calls memory."
    if section.reference is not None:
        caption += f" Lengths are multiples of {section.reference}, the dashed line."
    if np.isfinite(np.hstack([_reach(rows, name) for name, *_ in columns])).any():
        caption += f" Error bars: of T the 95 % interval over seeds and {section.parts},"
        caption += " of M the standard deviation over seeds."
    if logarithmic:
        caption += f" Dots in place of bars: the axis is logarithmic ({', '.join(logarithmic)})."
    if bounded.any():
        caption += " Hatched, or an arrow: out of memory, so at least this."
    return Plot("costs", "Time, parameters and memory", caption, figure)


def _memory_title(section: Section) -> str:
    """M with what it is the memory of: others publish it of other things, most often that of torch's allocator."""
    if "source" not in section.group.key:
        return "M, training"
    memories = [(one.result, one.result.training_memory) for one in section.records if one.result.training_memory]
    read = {memory_instrument("memory_bytes", memory, instruments_of(result)) for result, memory in memories}
    return "M, torch's allocator" if read and all(name.startswith("torch_") for name in read) else "M"


def _reach(rows: pd.DataFrame, name: str) -> Array:
    """Ends of the error bars of a cost, shape ``(2, rows)``: its interval, or one deviation over seeds either way."""
    if f"{name}_low" in rows:
        return rows[[f"{name}_low", f"{name}_high"]].to_numpy(dtype=np.float64).T
    if f"{name}_sd" in rows:
        value, sd = (rows[key].to_numpy(dtype=np.float64) for key in (name, f"{name}_sd"))
        return np.stack([value - sd, value + sd])
    return np.full((2, len(rows)), np.nan)
