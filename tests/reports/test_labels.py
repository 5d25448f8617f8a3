from __future__ import annotations

import itertools

import numpy as np
import pytest
from figure_checks import enters, overlapping, plot_of, write_crowd
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from tpme.reports.figures.labels import place_labels
from tpme.reports.figures.style import new_figure, style


@pytest.mark.parametrize("count", [12, 25])
def test_names_of_points_keep_clear_of_the_front_and_of_reference_lines(factory, count):
    write_crowd(factory, count)
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


def test_labels_of_identical_points_and_of_a_crowd_stay_apart():
    generator = np.random.default_rng(0)
    points = [(0.5, 0.5)] * 6 + [tuple(point) for point in generator.normal(0.5, 0.03, (19, 2))]
    with style():
        figure = new_figure(3.5, 3.5)
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        unplaced = place_labels(axes, points, [f"a method {index}" for index in range(25)])
        names = [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
        assert sorted([*unplaced, *(text.get_text() for text in names)]) == sorted(f"a method {i}" for i in range(25))
        assert len(names) >= 10
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


def leads(axes) -> list[np.ndarray]:
    """Lines from points to their names, shape ``(2 ends, 2)`` in pixels."""
    drawn = [text for text in axes.texts if isinstance(text, Annotation) and text.arrow_patch and not text.get_text()]
    return [
        text.arrow_patch.get_transform().transform_path(text.arrow_patch.get_path()).vertices[[0, -1]] for text in drawn
    ]


def crossing(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two lines cross, by solving for the place on each; those that begin at one point do not."""
    along = np.column_stack([one[1] - one[0], other[0] - other[1]])
    if abs(np.linalg.det(along)) < 1e-9:
        return False
    places = np.linalg.solve(along, other[0] - one[0])
    return bool(((places > 0.01) & (places < 0.99)).all())


@pytest.mark.parametrize("count", [12, 18, 25])
def test_no_line_to_a_name_crosses_another_or_runs_through_a_name(factory, count):
    write_crowd(factory, count)
    [axes] = plot_of(factory, "quality-tpme").figure.axes
    with style():
        axes.figure.canvas.draw()
        texts = [text for text in axes.texts if text.get_text() and text.xycoords == "data"]
        names = [text.get_window_extent() for text in texts]
    lines = leads(axes)
    assert len(names) == count
    assert lines, "a crowd without a single line would test nothing"
    assert [pair for pair in itertools.combinations(lines, 2) if crossing(*pair)] == []
    shrunk = [box.padded(-1) for box in names]  # a line ends at the box of its own name
    assert [line for line in lines if any(enters(line, box) for box in shrunk)] == []


def test_no_line_to_a_name_runs_through_another_point(factory):
    write_crowd(factory, 12)
    [axes] = plot_of(factory, "quality-tpme").figure.axes
    lines = leads(axes)
    assert lines
    spots = axes.transData.transform(
        np.array([text.xy for text in axes.texts if text.get_text() and text.xycoords == "data"])
    )
    dots = [Bbox.from_extents(*(spot - 3), *(spot + 3)) for spot in spots]
    others = [(line, dot) for line in lines for dot in dots if not any(dot.contains(*end) for end in line)]
    assert [line for line, dot in others if enters(line, dot)] == [], "through another row's point"


def test_the_crossing_check_notices_a_crossing():
    one, other = np.array([[0.0, 0.0], [1, 1]]), np.array([[0.0, 1.0], [1, 0]])
    assert crossing(one, other)
    assert not crossing(one, one + 1)
