from __future__ import annotations

import numpy as np
import pytest
from figure_checks import plot_of, write_crowd, written

from tpme.reports.figures.style import SILVER


def test_loss_and_validation_of_every_row_per_epoch_and_over_time(factory):
    factory.write("fft", time=10.0, skill=0.3)
    factory.write("lora", time=2.0, skill=0.2)
    figure = plot_of(factory, "learning").figure
    loss, quality, over_time = figure.axes
    place = [text.get_text() for text in over_time.get_legend().get_texts()].index("lora")
    lines = [axes.lines[place * step] for axes, step in ((loss, 1), (quality, 2), (over_time, 2))]
    assert [line.get_xdata().tolist() for line in lines] == [[1, 2, 3, 4], [1, 2, 3, 4], [2, 4, 6, 8]]
    assert lines[0].get_ydata() == pytest.approx(5.0 / np.arange(1, 5))
    assert lines[1].get_ydata() == pytest.approx(0.2 * np.array([0.5, 0.8, 1.0, 0.9]))
    best = quality.lines[2 * place + 1]
    assert (best.get_xdata().tolist(), best.get_markerfacecolor()) == ([3], "white"), "the epoch that is tested"
    assert {"training loss", "validation Recall@10", "epoch", "training time (s)"} <= set(written(figure))


def test_of_many_rows_six_a_line_are_in_colour_and_all_in_the_legends(factory):
    write_crowd(factory, 14)
    plot = plot_of(factory, "learning")
    legends = [axes.get_legend() for axes in plot.figure.axes if axes.get_legend()]
    assert [len(legend.get_texts()) for legend in legends] == [6, 6, 2]
    assert len({text.get_text() for legend in legends for text in legend.get_texts()}) == 14
    for axes, others in zip(plot.figure.axes[::3], (8, 8, 12), strict=True):
        assert sum(line.get_color() == SILVER for line in axes.lines) == others
    assert "6 rows a line, in the order of the tables; grey: all others." in plot.caption


def test_rows_whose_loss_has_further_terms_are_named(factory):
    path = factory.write("dyt")
    factory.write("lora")
    raw = path.read_text().replace('"losses": {}', '"losses": {"task": 3.0, "rate": 2.0}')
    path.write_text(raw)
    assert "so not on the scale of the others: dyt." in plot_of(factory, "learning").caption
