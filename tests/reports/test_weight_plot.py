from __future__ import annotations

import re

import numpy as np
from figure_checks import all_plots, overlapping, plot_of, write_crowd
from matplotlib.colors import to_hex

from tpme.reports.figures.style import SILVER, style
from tpme.reports.report import make_report


def test_no_two_of_many_winners_look_alike(factory):
    """Rows on a sphere around the most of everything: each wins where the weights point at it."""
    turns = [(0.12 + 0.22 * i, 0.06 + 0.2 * j) for i in range(7) for j in range(8)]
    for index, (polar, azimuth) in enumerate(turns):
        x, y, z = np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)
        factory.write(f"m{index}", time=20 - 10 * x, millions=2 - y, peak=(2 - z) * 1e9)
    figure = plot_of(factory, "weights").figure
    [legend] = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    looks = [(to_hex(patch.get_facecolor()), patch.get_hatch()) for patch in legend.get_patches()]
    assert len(looks) == len(set(looks)) == 13
    assert [text.split()[0] for text in told[:-1]] == [str(place) for place in range(1, 13)]
    assert re.fullmatch(r"\d\d others \(\d\d %\)", told[-1])
    assert looks[-1] == (SILVER.lower(), None)
    written = {text.get_text() for text in figure.axes[0].texts}
    assert {str(place) for place in range(1, 13)} <= written
    with style():
        assert overlapping(figure) == []


def test_the_simplex_of_weights_shows_who_wins_where_and_how_often(factory):
    for method, time, millions, peak in (("fft", 10, 10, 10e9), ("fast", 0, 10, 10e9), ("small", 10, 0, 10e9)):
        factory.write(method, time=time + 1.0, millions=millions + 1.0, peak=peak)
    (section,) = make_report([factory.root]).sections
    figure = next(plot for plot in all_plots(section) if plot.name == "weights").figure
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    # M is the same for all, so whoever of T and P weighs more decides; fft is never alone the best.
    assert labels == ["1  fast (50 %)", "2  small (50 %)"]


def test_the_region_of_a_row_is_where_its_tpme_is_lowest(factory):
    write_crowd(factory, 10)
    (section,) = make_report([factory.root]).sections
    costs = section.summary.loc[section.compared, ["epoch_time_s", "trainable_millions", "memory_bytes"]].to_numpy()
    terms = (costs - costs.min(axis=0)) / (costs.max(axis=0) - costs.min(axis=0))
    draws = np.random.default_rng(1).dirichlet((1, 1, 1), 20_000)
    drawn = np.bincount((draws @ terms.T).argmin(axis=1), minlength=len(terms)) / len(draws)
    figure = next(plot for plot in all_plots(section) if plot.name == "weights").figure
    told = dict(
        re.fullmatch(r"(?:\d+  )?(.*?)\*? \((?:[<>] )?(\d+) %\)", text.get_text()).groups()
        for text in figure.legends[0].get_texts()
    )
    for name, share in zip(section.compared, drawn, strict=True):
        assert abs(100 * share - float(told.get(name, 0))) < 2


def test_no_simplex_where_one_row_wins_nearly_everywhere_and_the_figure_of_tpme_says_so(factory):
    factory.write("fft", time=20.0, millions=10.0, peak=10e9)
    factory.write("cheap", time=1.0, millions=1.01, peak=1e9)
    factory.write("tiny", time=19.0, millions=1.0, peak=9e9)
    (section,) = make_report([factory.root]).sections
    plots = {plot.name: plot for plot in all_plots(section)}
    assert "weights" not in plots
    share = int(re.search(r"cheap has the lowest TPME under (\d+) % of all weights", plots["tpme"].caption)[1])
    assert 90 <= share < 100
    factory.write("tiny", time=3.0, millions=0.5, peak=1.5e9, attempt=2, started_at="2026-02-01T00:00:00+00:00")
    (section,) = make_report([factory.root]).sections
    plots = {plot.name: plot for plot in all_plots(section)}
    assert "weights" in plots
    assert "of all weights" not in plots["tpme"].caption
