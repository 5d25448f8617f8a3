from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from figure_checks import all_plots, overlapping, plot_of, write_crowd, written
from matplotlib.colors import to_hex

from tpme.bench.record import Flag
from tpme.reports.figures.costs import make_plot, makers
from tpme.reports.figures.style import new_figure, row_looks, save, style
from tpme.reports.report import make_report


@pytest.mark.parametrize("count", [12, 25])
def test_no_text_covers_another(factory, count):
    write_crowd(factory, count)
    (section,) = make_report([factory.root]).sections
    plots = all_plots(section)
    names = [plot.name for plot in plots if plot.name != "weights"]  # only where no row wins nearly everywhere
    assert names == ["quality-tpme", "tpme", "costs", "memory-time", "phases", "learning", "step-times"]
    for plot in plots:
        with style():
            assert overlapping(plot.figure) == [], plot.name


def test_the_overlap_check_notices_an_overlap():
    with style():
        figure = new_figure(3, 3)
        figure.text(0.5, 0.5, "one")
        figure.text(0.51, 0.5, "other")
        assert overlapping(figure) == [("one", "other")]


def test_files_carry_no_date_and_are_the_same_twice(factory):
    write_crowd(factory, 4)
    files = []
    for _ in range(2):
        (section,) = make_report([factory.root]).sections
        files.append([save(plot.figure, ending) for plot in all_plots(section) for ending in ("png", "svg", "pdf")])
    assert files[0] == files[1]
    for file in files[0]:
        assert b"Matplotlib" not in file
        assert not re.search(rb"<dc:date>|tEXt", file)


def test_names_are_never_read_as_mathematics_or_markup(factory):
    for name in ("$x_1$", "<script>", "a_b&c%", "$broken"):
        factory.write(name, time=float(len(name)))
    (section,) = make_report([factory.root]).sections
    for plot in all_plots(section):
        svg = save(plot.figure, "svg")
        assert b"<script" not in svg
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        if plot.name == "weights":  # names winners alone
            continue
        assert "$broken" in written(plot.figure)


def test_a_row_out_of_memory_is_a_hatched_bar(factory):
    factory.write("fft", peak=30e9)
    factory.write("dyt", status="oom", time=None, peak=80e9)
    (section,) = make_report([factory.root]).sections
    costs = next(plot for plot in all_plots(section) if plot.name == "costs")
    assert "≥ 80.0" in written(costs.figure)
    for axes in costs.figure.axes[2:]:
        assert len([bar for bar in axes.patches if bar.get_hatch()]) == 1, "M and the whole-run peak"


def test_a_row_out_of_memory_is_named_with_every_figure(factory):
    for method, time_s in (("fft", 10.0), ("lora", 4.0)):
        factory.write(method, time=time_s, peak=30e9)
    factory.write("dyt", status="oom", time=None, peak=80e9)
    plots = all_plots(make_report([factory.root]).sections[0])
    assert {"quality-tpme", "tpme", "costs", "phases", "memory-time", "step-times"} <= {plot.name for plot in plots}
    assert all("Out of memory: dyt, M ≥ 80.0 GB." in plot.caption for plot in plots)


def test_one_row_has_no_quality_figure_and_no_samples_no_curves(factory):
    path = factory.write("lora")
    (section,) = make_report([factory.root]).sections
    assert [plot.name for plot in all_plots(section)] == ["costs", "memory-time", "phases", "learning", "step-times"]
    raw = path.read_text()
    path.write_text(raw.replace('"samples": "samples-1.npz",', ""))
    (section,) = make_report([factory.root]).sections
    assert [plot.name for plot in all_plots(section)] == ["costs", "phases", "learning"]


def test_a_logarithmic_axis_and_the_mark_of_a_footnote_are_explained_where_there_are_any(factory):
    factory.write("fft", millions=100.0)
    factory.write("lora", millions=50.0)
    caption = plot_of(factory, "costs").caption
    assert "logarithmic" not in caption
    assert "*" not in caption
    factory.write("bitfit", millions=0.01, flags=(Flag(code="throttled", message="the clock was throttled"),))
    caption = plot_of(factory, "costs").caption
    assert "Dots in place of bars: the axis is logarithmic (P)." in caption
    assert caption.endswith("*: the row has a footnote under the table of results.")


def test_costs_have_error_bars_over_seeds_and_the_whole_run_peak(factory):
    for seed, time in enumerate((10.0, 12.0, 11.0)):
        factory.write("fft", time=time, peak=2e9 + seed * 1e8, seed=seed)
    factory.write("lora", time=5.0, peak=1e9)
    plot = plot_of(factory, "costs")
    times, _, memory, peak = plot.figure.axes

    def error_bars(axes) -> dict[int, tuple[float, float]]:
        [lines] = axes.collections
        return {round(ends[0, 1]): tuple(ends[:, 0]) for ends in lines.get_segments() if len(ends) == 2}

    order = [label.get_text() for label in times.get_yticklabels()]
    fft, lora = len(order) - 1 - order.index("fft"), len(order) - 1 - order.index("lora")
    low, high = error_bars(times)[fft]
    assert low < 1 < high, "in multiples of fft"
    assert error_bars(memory)[fft] == pytest.approx((1 - 1 / 21, 1 + 1 / 21))
    assert lora not in error_bars(memory), "one seed has no spread"
    assert peak.get_title() == "Peak, whole run (GB)"
    assert {"2.20", "1.00"} <= {text.get_text() for text in peak.texts}, "the highest of the seeds"


def test_phase_shares_carry_seconds(factory):
    factory.write("fft", time=10.0)
    texts = written(plot_of(factory, "phases").figure)
    assert {"40.0", "42.9 s"} <= set(texts), "of training, and of the whole run"
    assert "0.500" not in texts, "a share of 1 % has no room"


def test_a_row_looks_the_same_in_every_section_and_like_no_other(factory):
    for device in ("one", "other"):
        for place, method in enumerate(("fft", "lora", "bitfit")):
            time = float(1 + place if device == "one" else 9 - 3 * place)
            factory.write(method, time=time, device_key=device, seed=1 if device == "one" else 2)
    sections = make_report([factory.root]).sections
    assert len(sections) == 2
    assert list(sections[0].lines) != list(sections[1].lines)
    colours = []
    for section in sections:
        [learning] = [
            plot for make in makers(sections) if (plot := make_plot(make, section)) and plot.name == "learning"
        ]
        [legend] = [axes.get_legend() for axes in learning.figure.axes if axes.get_legend()]
        told = zip(legend.get_texts(), legend.get_lines(), strict=True)
        colours.append({text.get_text(): to_hex(line.get_color()) for text, line in told})
    assert colours[0] == colours[1]
    looks = row_looks(f"row {index}" for index in range(60))
    assert len({(look.colour, look.hatch) for look in looks.values()}) == 60
    for start in range(0, 60, 6):
        line = list(looks.values())[start : start + 6]
        assert len({look.marker for look in line}) == len({str(look.dashes) for look in line}) == 6
