from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
from figure_checks import plot_of, written
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tpme.bench.record import PhaseKind
from tpme.bench.side_files import Samples
from tpme.reports.data.load import thin
from tpme.reports.data.phase_colours import PHASE_COLOURS
from tpme.reports.figures.style import COLOURS, PHASE_HATCHES
from tpme.reports.page import page
from tpme.reports.report import make_report


def test_every_kind_of_phase_has_one_colour_that_no_row_has():
    assert set(PHASE_COLOURS) == set(get_args(PhaseKind))
    assert len(set(PHASE_COLOURS.values()) | set(COLOURS)) == len(PHASE_COLOURS) + len(COLOURS)
    assert set(PHASE_HATCHES) < set(PHASE_COLOURS)
    assert len(set(PHASE_HATCHES.values())) == len(PHASE_HATCHES)


def spans(axes) -> list[tuple[str, str, float, float]]:
    """Kind, colour, start and end of what is filled under a memory curve, in the order of time."""
    found = [
        (filled.get_label(), to_hex(filled.get_facecolor()[0]), path.vertices[:, 0].min(), path.vertices[:, 0].max())
        for filled in axes.collections
        for path in filled.get_paths()
        if filled.get_label() in PHASE_COLOURS
    ]
    return sorted(found, key=lambda span: span[2])


def phase_legend(figure: Figure) -> dict[str, str]:
    """Colours of the phases as the legend says."""
    legend = figure.legends[0]
    told = zip(legend.get_texts(), legend.get_patches(), strict=True)
    return {text.get_text(): to_hex(patch.get_facecolor()) for text, patch in told}


def test_a_colour_means_one_phase_in_every_figure_of_every_report(factory, make_factory, tmp_path):
    path = factory.write("fft", time=10.0)
    other = make_factory(tmp_path / "other")
    rarer = other.write("fft", time=10.0)
    rarer.write_text(rarer.read_text().replace('"load"', '"cache"').replace('"rank"', '"export"'))
    for factory_of, kinds in (
        (factory, ("load", "train", "validate", "rank")),
        (other, ("cache", "train", "validate", "export")),
    ):
        for name in ("memory-time", "phases"):
            assert phase_legend(plot_of(factory_of, name).figure) == {
                kind: PHASE_COLOURS[kind].lower() for kind in kinds
            }
    expected = [("load", 0, 0.5), ("train", 0.5, 40.5), ("validate", 40.5, 42.5), ("rank", 42.5, 42.9)]
    drawn = spans(plot_of(factory, "memory-time").figure.axes[0])
    for (kind, colour, start, end), (known, *ends) in zip(drawn, expected, strict=True):
        assert (kind, colour) == (known, PHASE_COLOURS[known].lower())
        assert [start, end] == pytest.approx(ends)
    path.write_text(path.read_text().replace('"validate"', '"train"'))  # neighbours of a kind are one
    joined = spans(plot_of(factory, "memory-time").figure.axes[0])
    assert joined[1][2:] == pytest.approx((0.5, 42.5))


def test_a_section_in_which_nothing_trained_has_curves_without_m(factory):
    """Such as a search all of whose trials fail."""
    factory.write("autopeft", status="error", time=None, peak=None)
    figure = plot_of(factory, "memory-time").figure
    assert [text.get_text().split()[0] for text in figure.axes[0].texts if "M" in text.get_text()] == []


def test_the_curve_is_on_the_scale_of_m_and_of_the_peak(factory):
    """Samples include 331 MB held before data were loaded; M and the peak do not."""
    path = factory.write("lora", time=10.0, peak=200e6).parent / "samples-1.npz"
    samples = dict(np.load(path))
    during_training = (samples["sample_t_s"] > 0.5) & (samples["sample_t_s"] <= 40.5)
    samples["sample_bytes"] *= 200e6 / samples["sample_bytes"][during_training].max()
    samples["sample_bytes"] += 331e6
    np.savez(path, **samples)
    record = path.parent / "attempt-1.json"
    raw = json.loads(record.read_text())
    raw["phases"][2]["memory"]["host_rss_bytes"]["value"] = 350e6  # validation needs more than training
    record.write_text(json.dumps(raw))
    figure = plot_of(factory, "memory-time").figure
    [axes] = [axes for axes in figure.axes if axes.get_visible()]
    curve = axes.lines[0].get_ydata()
    inside = (axes.lines[0].get_xdata() > 0.5) & (axes.lines[0].get_xdata() <= 40.5)
    assert curve[inside].max() == pytest.approx(200, rel=1e-6)
    assert curve.min() >= 0
    [level] = [line for line in axes.collections if line.get_label() not in PHASE_COLOURS]
    assert level.get_segments()[0].tolist() == [[0.5, 200.0], [40.5, 200.0]], "M, over the phases of training"
    assert axes.lines[1].get_ydata() == pytest.approx([350, 350])
    assert axes.get_ylim()[1] > 350
    texts = written(figure)
    assert {"M 200", "peak 350\nin validate", "memory (MB)", "train"} <= set(texts)
    assert "M: peak while training" in texts


def test_a_peak_of_another_run_is_said_to_be_one(factory):
    factory.write("iisan", cached=True, peak=50e6)
    record = next((factory.root / "cells").glob("*/attempt-1.json"))
    raw = json.loads(record.read_text())
    raw["cache"]["peak_bytes"] = {"value": 400e6, "source": "VmHWM"}
    raw["cache"]["built_by_attempt"] = False
    record.write_text(json.dumps(raw))
    plot = plot_of(factory, "memory-time")
    assert "peak 400\nin cache" in written(plot.figure)
    assert "Another run built the cache, and so reached the peak, of iisan (cached)." in plot.caption


def test_every_panel_of_memory_has_its_own_time_and_the_common_memory(factory):
    times = (0.3, 4.0, 25.0, 3000.0)
    for index, time in enumerate(times):
        factory.write(f"method_{index}", time=time, peak=(1 + index) * 1e9)
    figure = plot_of(factory, "memory-time").figure
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_xlim()[1] for axes in shown] == pytest.approx([5 * time for time in times])
    for axes in shown:
        assert axes.get_ylim() == pytest.approx((0, 1.06 * 4), rel=0.05)
    assert len({axes.get_ylim() for axes in shown}) == 1
    for axes in shown:
        assert axes.get_position().height * figure.get_figheight() > 0.9, "inches"
        assert axes.get_position().width * figure.get_figwidth() > 1.3


def test_a_memory_that_could_not_be_read_at_times_or_never_leaves_a_gap_or_no_curve(factory):
    for method, unread in (("fft", slice(3, 9)), ("lora", slice(None))):
        path = factory.write(method).parent / "samples-1.npz"
        samples = dict(np.load(path))
        samples["sample_bytes"][unread] = np.nan
        np.savez(path, **samples)
    [axes] = plot_of(factory, "memory-time").figure.axes
    assert axes.get_title("left").startswith("fft")
    assert np.isfinite(axes.lines[0].get_ydata()).all()
    (section,) = make_report([factory.root]).sections
    assert "NaN" not in page("", [section], section.weights)


def test_thinning_keeps_the_peak_and_the_end():
    used = np.zeros(10_001)
    used[1234] = 7.0
    time_s, kept = thin(Samples(np.ones(1), np.ones(1), np.arange(10_001.0), used))
    assert len(kept) <= 400
    assert kept.max() == 7.0
    assert time_s[-1] == 10_000
    assert abs(time_s[kept.argmax()] - 1234) <= 26
