from __future__ import annotations

import itertools
import re
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from tpme.bench.record import Flag
from tpme.reports.data.load import Samples, thin
from tpme.reports.data.section import Section
from tpme.reports.figures.costs import make_plot, makers
from tpme.reports.figures.labels import place_labels
from tpme.reports.figures.style import SILVER, Plot, new_figure, save, style
from tpme.reports.page import page
from tpme.reports.report import make_report


def all_plots(section: Section) -> list[Plot]:
    """Every figure that has data."""
    return [plot for make in makers() if (plot := make_plot(make, section)) is not None]


def boxes(figure: Figure) -> list[tuple[str, object]]:
    """Extents of everything that is really written when the figure is drawn (not of ticks beyond the axes)."""
    drawn: dict[int, Text] = {}
    draw = Text.draw

    def spy(text: Text, renderer: object) -> None:
        drawn[id(text)] = text
        draw(text, renderer)

    with mock.patch.object(Text, "draw", spy):
        figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    written = [text for text in drawn.values() if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in written]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    def inside(one, other):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        up = min(one.y1, other.y1) - max(one.y0, other.y0)
        return across > 1 and up > 1

    pairs = itertools.combinations(boxes(figure), 2)
    return [(a, b) for (a, one), (b, other) in pairs if inside(one, other)]


def methods(factory, count: int) -> None:
    """So many rows whose quality and costs crowd together."""
    generator = np.random.default_rng(count)
    factory.write("fft", time=22.0, millions=100.0, peak=40e9)
    for index in range(count - 1):
        factory.write(
            f"method_number_{index}"[: 6 + index % 10] + str(index),
            time=float(generator.choice([3.0, 12.0, 13.0, 20.0])) * generator.uniform(0.95, 1.05),
            millions=float(10 ** generator.uniform(-3, 1)),
            peak=float(generator.choice([5e9, 30e9, 32e9])) * generator.uniform(0.97, 1.03),
            skill=float(generator.choice([0.25, 0.27, 0.3])),
        )


@pytest.mark.parametrize("count", [12, 25])
def test_no_text_covers_another(factory, count):
    methods(factory, count)
    (section,) = make_report([factory.root]).sections
    plots = all_plots(section)
    assert [plot.name for plot in plots] == [
        "quality-tpme", "ranks", "weights", "costs", "phases", "memory-time", "step-times",
    ]  # fmt: skip
    for plot in plots:
        with style():
            assert overlapping(plot.figure) == [], plot.name


def plot_of(factory, name: str):
    (section,) = make_report([factory.root]).sections
    return next(plot for plot in all_plots(section) if plot.name == name)


def enters(ends: np.ndarray, box) -> bool:
    """Whether a line, shape ``(points, 2)`` in pixels, runs through a box."""
    share = np.linspace(0, 1, 2000)[:, None]
    along = np.vstack([start + share * (end - start) for start, end in itertools.pairwise(ends)])
    x, y = along.T
    return bool(((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)).any())


@pytest.mark.parametrize("count", [12, 25])
def test_names_of_points_keep_clear_of_the_front_and_of_reference_lines(factory, count):
    methods(factory, count)
    for name, skill in (("frozen", 0.26), ("id", 0.29)):
        factory.write(name, time=3.0, millions=0.001, peak=4e9, skill=skill)
    figure = plot_of(factory, "quality-tpme").figure
    [axes] = figure.axes
    names = [text for text in axes.texts if text.get_text() and text.xycoords == "data"]
    assert len(names) == count
    with style():
        figure.canvas.draw()
        extents = [name.get_window_extent() for name in names]
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"]
    assert len(lines) == 3, "the front and two references"
    assert [box for box in extents if any(enters(line, box) for line in lines)] == []


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_a_name_goes_where_no_line_is(kind):
    upright = ((0.55, 0.2), (0.55, 0.8))
    for told, crossed in (({}, True), ({kind: [upright]}, False)):
        with style():
            figure = new_figure(3, 3)
            axes = figure.add_subplot()
            axes.set(xlim=(0, 1), ylim=(0, 1))
            place_labels(axes, [(0.5, 0.5)], ["a name"], **told)
            box = axes.texts[0].get_window_extent(figure.canvas.get_renderer())
            assert enters(axes.transData.transform(upright), box) == crossed


def test_the_overlap_check_notices_an_overlap():
    with style():
        figure = new_figure(3, 3)
        figure.text(0.5, 0.5, "one")
        figure.text(0.51, 0.5, "other")
        assert overlapping(figure) == [("one", "other")]


def test_labels_of_identical_points_and_of_a_crowd_stay_apart():
    generator = np.random.default_rng(0)
    points = [(0.5, 0.5)] * 6 + [tuple(point) for point in generator.normal(0.5, 0.03, (19, 2))]
    with style():
        figure = new_figure(3.5, 3.5)
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        place_labels(axes, points, [f"a method {index}" for index in range(25)])
        names = [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
        assert len(names) == 25
        assert overlapping(figure) == []
        window = axes.get_window_extent()
        for name in names:
            box = name.get_window_extent(figure.canvas.get_renderer())
            assert window.x0 - 1 <= box.x0
            assert box.x1 <= window.x1 + 1


def test_a_name_without_room_is_left_out_and_returned():
    with style():
        figure = new_figure(1, 1)
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        assert place_labels(axes, [(0.5, 0.5), (0.5, 0.6)], ["a", "wider than the axes"]) == ["wider than the axes"]
        assert [text.get_text() for text in axes.texts] == ["a"]


def test_files_carry_no_date_and_are_the_same_twice(factory):
    methods(factory, 4)
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
        with style():
            assert "$broken" in [text for text, _ in boxes(plot.figure)]


def test_thinning_keeps_the_peak_and_the_end():
    used = np.zeros(10_001)
    used[1234] = 7.0
    time_s, kept = thin(Samples(np.ones(1), np.ones(1), np.arange(10_001.0), used))
    assert len(kept) <= 400
    assert kept.max() == 7.0
    assert time_s[-1] == 10_000
    assert abs(time_s[kept.argmax()] - 1234) <= 26


def test_a_row_out_of_memory_is_a_hatched_bar(factory):
    factory.write("fft", peak=30e9)
    factory.write("dyt", status="oom", time=None, peak=80e9)
    (section,) = make_report([factory.root]).sections
    costs = next(plot for plot in all_plots(section) if plot.name == "costs")
    with style():
        assert "≥ 80.0" in [text for text, _ in boxes(costs.figure)]
    hatched = [bar for bar in costs.figure.axes[2].patches if bar.get_hatch()]
    assert len(hatched) == 1


def test_a_row_out_of_memory_is_named_with_every_figure(factory):
    for method, time_s in (("fft", 10.0), ("lora", 4.0)):
        factory.write(method, time=time_s, peak=30e9)
    factory.write("dyt", status="oom", time=None, peak=80e9)
    plots = all_plots(make_report([factory.root]).sections[0])
    assert {"quality-tpme", "weights", "costs", "phases", "memory-time", "step-times"} <= {plot.name for plot in plots}
    assert all("Out of memory: dyt, M ≥ 80.0 GB." in plot.caption for plot in plots)


def test_one_row_has_no_quality_figure_and_no_samples_no_curves(factory):
    path = factory.write("lora")
    (section,) = make_report([factory.root]).sections
    assert [plot.name for plot in all_plots(section)] == ["costs", "phases", "memory-time", "step-times"]
    raw = path.read_text()
    path.write_text(raw.replace('"samples": "samples-1.npz",', ""))
    (section,) = make_report([factory.root]).sections
    assert [plot.name for plot in all_plots(section)] == ["costs", "phases"]


def test_a_memory_that_could_not_be_read_at_times_or_never_leaves_a_gap_or_no_curve(factory):
    for method, unread in (("fft", slice(3, 9)), ("lora", slice(None))):
        path = factory.write(method).parent / "samples-1.npz"
        samples = dict(np.load(path))
        samples["sample_bytes"][unread] = np.nan
        np.savez(path, **samples)
    [axes] = plot_of(factory, "memory-time").figure.axes
    assert axes.get_title().startswith("fft")
    assert np.isfinite(axes.lines[-1].get_ydata()).all()
    (section,) = make_report([factory.root]).sections
    assert "NaN" not in page("", [section], section.weights)


def spans(axes) -> list[tuple[str, float, float]]:
    """Colour, start and end of what is filled under a memory curve."""
    [filled] = axes.collections
    ends = [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in filled.get_paths()]
    return [(to_hex(colour), *end) for colour, end in zip(filled.get_facecolors(), ends, strict=True)]


def colours(figure: Figure) -> dict[str, str]:
    """What the legend of the phases says."""
    [legend] = figure.legends
    return {
        text.get_text(): to_hex(patch.get_facecolor())
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }


def test_memory_over_time_shows_every_phase_where_it_was_in_the_colours_of_the_other_figure(factory):
    path = factory.write("fft", time=10.0)
    plot = plot_of(factory, "memory-time")
    told = colours(plot.figure)
    assert told == colours(plot_of(factory, "phases").figure)
    assert len(set(told.values())) == 4
    expected = [("load", 0, 0.5), ("train", 0.5, 40.5), ("validate", 40.5, 42.5), ("rank", 42.5, 42.9)]
    for span, (kind, start, end) in zip(spans(plot.figure.axes[0]), expected, strict=True):
        assert span == (told[kind], pytest.approx(start), pytest.approx(end))
    path.write_text(path.read_text().replace('"validate"', '"train"'))  # neighbours of a kind are one
    joined = plot_of(factory, "memory-time").figure
    assert spans(joined.axes[0])[1] == (colours(joined)["train"], pytest.approx(0.5), pytest.approx(42.5))


def test_every_panel_of_memory_says_how_long_it_is(factory):
    for index, time in enumerate((0.3, 4.0, 25.0, 3000.0)):
        factory.write(f"method_{index}", time=time)
    figure = plot_of(factory, "memory-time").figure
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    for axes, time in zip(shown, sorted((0.3, 4.0, 25.0, 3000.0)), strict=True):
        first, last = (float(label.get_text()) for label in axes.get_xticklabels())
        assert first == 0
        assert 2 * time <= last <= 5 * time == pytest.approx(axes.get_xlim()[1])


def test_a_logarithmic_axis_and_the_mark_of_a_footnote_are_explained_where_there_are_any(factory):
    factory.write("fft", millions=100.0)
    factory.write("lora", millions=50.0)
    caption = plot_of(factory, "costs").caption
    assert "Logarithmic" not in caption
    assert "*" not in caption
    factory.write("bitfit", millions=0.1, flags=(Flag(code="throttled", message="the clock was throttled"),))
    caption = plot_of(factory, "costs").caption
    assert "Logarithmic: P;" in caption
    assert caption.endswith("*: the row has a footnote under the table of results.")


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
    methods(factory, 12)
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


def test_ranks_under_resampling_are_drawn_row_by_row(factory):
    for method, times in (("fft", (20.0, 21.0)), ("lora", (9.0, 12.0)), ("bitfit", (9.5, 11.5))):
        for seed, time in enumerate(times):
            factory.write(method, time=time, seed=seed)
    (section,) = make_report([factory.root]).sections
    plot = next(plot for plot in all_plots(section) if plot.name == "ranks")
    assert "seeds and epochs" in plot.caption
    axes = plot.figure.axes[0]
    [mesh] = axes.collections
    share = np.asarray(mesh.get_array()).reshape(3, 3)
    assert share.sum(axis=1) == pytest.approx([100] * 3)
    assert [label.get_text() for label in axes.get_yticklabels()] == section.compared
    place = section.compared.index("fft")
    assert share[place].tolist() == [0, 0, 100]
    others = np.delete(share, place, axis=0)
    assert (others[:, :2] > 5).all(), "lora and bitfit change places"
    with style():
        written = [text for text, _ in boxes(plot.figure)]
    assert written.count("1–2") == 2
    assert "100" in written
