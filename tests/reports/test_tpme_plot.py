from __future__ import annotations

from figure_checks import plot_of, written

from tpme.reports.figures.tpme_plot import tpme_intervals
from tpme.reports.report import make_report


def write_rows(factory, middle: tuple[float, ...]) -> None:
    """A cheap and a dear row and some between them, of four seeds each."""
    for method, time in (("cheap", 1.0), *((f"row{index}", time) for index, time in enumerate(middle)), ("fft", 20.0)):
        for seed, share in enumerate((0.97, 1.0, 1.02, 1.01)):
            factory.write(method, time=time * share, peak=time * 1e8, millions=time, seed=seed)


def columns(figure) -> dict[str, list[str]]:
    """The texts beside the axes by their distance from them: rank, ranks in 95 %, cost."""
    [axes] = figure.axes
    found: dict[float, list[str]] = {}
    for text in axes.texts:
        found.setdefault(text.xyann[0], []).append(text.get_text())
    return {texts[0]: texts[1:] for texts in found.values()}


def test_rows_are_sorted_lines_with_intervals_and_ties_share_a_rank(factory):
    write_rows(factory, (8.0, 8.1))
    plot = plot_of(factory, "tpme")
    [axes] = plot.figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["cheap", "row0", "row1", "fft"]
    texts = columns(plot.figure)
    assert texts["rank"] == ["1", "2 =", "2 =", "4"]
    assert texts["in\n95 %"][0] == "1"
    assert texts["in\n95 %"][3] == "4"
    costs = [float(text) for text in texts["cost,\n× fft"]]
    assert costs == sorted(costs)
    assert costs[3] == 1.0
    [lines] = axes.collections
    intervals = {round(segment[0, 1]): segment[:, 0] for segment in lines.get_segments() if len(segment) == 2}
    assert {1, 2} <= set(intervals), "horizontal, for the rows between"
    for y in (1, 2):
        assert intervals[y][0] < intervals[y][1]
    [band] = [patch for patch in axes.patches if patch.get_height() > 0]
    assert (band.get_y(), band.get_y() + band.get_height()) == (0.55, 2.45), "behind the tied rows"
    for words in (
        "between the cheapest (0 %) and the dearest (100 %) of these 4 rows",
        "tied within noise",
        "spread over seeds",
    ):
        assert words in plot.caption


def test_an_end_of_the_scale_has_an_open_dot_and_no_interval(factory):
    write_rows(factory, (8.0,))
    (section,) = make_report([factory.root]).sections
    ends = section.summary.loc[section.compared, "tpme_end"]
    assert ends.any()
    plot = plot_of(factory, "tpme")
    [axes] = plot.figure.axes
    opened = next(line for line in axes.lines if line.get_markerfacecolor() == "white")
    assert len(opened.get_ydata()) == ends.sum()
    assert "Open dots have none: the row is an end of the scale" in plot.caption


def test_without_reference_noise_or_repetition_the_figure_says_so_or_leaves_it_out(factory):
    factory.write("lora", time=2.0)
    factory.write("bitfit", time=5.0, millions=2.0)
    plot = plot_of(factory, "tpme")
    assert "×" not in " ".join(written(plot.figure))
    assert "no tie is claimed" in plot.caption
    assert "=" not in " ".join(columns(plot.figure)["rank"])


def test_one_row_has_no_tpme_to_draw(factory):
    factory.write("lora")
    (section,) = make_report([factory.root]).sections
    assert tpme_intervals(section) is None
