"""The figure of training step times."""

from __future__ import annotations

import numpy as np

from tpme.bench.side_files import load_samples
from tpme.reports.data.load import Array, Recorded
from tpme.reports.data.section import Section
from tpme.reports.figures.style import (
    COLUMN_INCHES,
    INK,
    LOG_FROM,
    Plot,
    log_axis,
    name_rows,
    new_figure,
    row_label,
)


def step_times(section: Section) -> Plot | None:
    """Distribution of training step times of one cell of every row, without warm-up epochs."""
    firsts = section.firsts(sampled=True)
    times = {name: steps for name, recorded in firsts.items() if len(steps := _steady_steps(recorded))}
    if not times:
        return None
    figure = new_figure(COLUMN_INCHES, 0.5 + 0.17 * len(times))
    axes = figure.add_subplot()
    position = name_rows(figure, axes, [row_label(section, name) for name in times], top=0.05, right=0.15)
    drawn = axes.boxplot(
        [1000 * steps for steps in times.values()], positions=position, manage_ticks=False,
        orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False, patch_artist=True,
    )  # fmt: skip
    for box in drawn["boxes"]:
        box.set(facecolor=INK, alpha=0.35, linewidth=0.5)
    for line in (*drawn["medians"], *drawn["whiskers"], *drawn["caps"]):
        line.set(color="black", linewidth=0.6)
    axes.set_xlabel("training step (ms)")
    caption = (
        "Training steps of one run of each row (its first seed) after the warm-up epochs: median, quartiles, "
        "5th to 95th percentile."
    )
    reach = np.array([np.percentile(1000 * steps, (5, 50, 95)) for steps in times.values()])
    if reach[:, 1].max() > LOG_FROM * reach[:, 1].min():
        log_axis(axes, reach.min() / 1.2, 1.2 * reach.max(), 6)
        caption += " The axis is logarithmic."
    return Plot("step-times", "Step times", caption, figure)


def _steady_steps(recorded: Recorded) -> Array:
    """Seconds of the steps after the warm-up epochs, or of all where there are no others."""
    samples = load_samples(str(recorded.beside("samples")))
    steady = samples.step_epoch > recorded.result.warmup_epochs
    return samples.step_s[steady] if steady.any() else samples.step_s
