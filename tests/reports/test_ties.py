from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tpme.bench.errors import UserError
from tpme.bench.record import Reading, read_result
from tpme.reports.data.ratios import cost_ratios, reference_row
from tpme.reports.data.ties import RUNS_APART, RunNoise, noise_of, tied_ranks
from tpme.reports.data.tpme import Weights, frame_of, tpme
from tpme.reports.report import make_report
from tpme.reports.tables.results import results
from tpme.reports.tables.scales import scales


def section_of(factory, **options):
    [section] = make_report([factory.root], **options).sections
    return section


def with_noise(path, time, memory):
    """The record of a device whose noise floor was measured."""
    result = read_result(path)
    floor = {"noise_time_ratio": time, "noise_memory_ratio": memory}
    readings = {name: Reading(value=value, source="A/A runs") for name, value in floor.items()}
    path.write_text(result.model_copy(update={"counters": {**result.counters, **readings}}).model_dump_json())


def test_rows_nearer_than_the_noise_floor_share_a_rank(factory):
    """Two versions of one method, 0.336 s and 0.352 s: TPME makes 0 and 45 of them, or 90 where memory differs too."""
    factory.write("lora", time=0.336, peak=1.00e9)
    with_noise(factory.write("bitfit", time=0.352, peak=1.01e9), 0.05, 0.01)
    section = section_of(factory)
    assert section.summary["tpme"].max() == pytest.approx(0.90)
    assert list(section.summary["tpme_rank"]) == [1, 1]
    assert section.ties == ["lora", "bitfit"]
    ranks = {str(row[0].text): row[-1] for row in results(section).rows}
    places = [column.key for column in results(section).columns].index("tpme_rank")
    assert {row[places].text for row in results(section).rows} == {"1="}, ranks
    note = "Each of the rows that share a rank (=) is tied within noise with the first of them."
    assert note in results(section).notes
    assert any("(=): two runs of one cell differ by up to 5 %" in note for note in scales(section).notes)


def test_what_noise_cannot_explain_is_no_tie(factory):
    """In a wide frame the same noise moves TPME by little; the third row is nearer to the second than to the first."""
    factory.write("fft", time=10.0)
    factory.write("lora", time=2.0)
    factory.write("bitfit", time=1.5)
    with_noise(factory.write("adapter", time=1.45), 0.05, 0.0)
    summary = section_of(factory).summary
    assert summary["tpme_rank"].to_dict() == {"adapter": 1, "bitfit": 1, "lora": 3, "fft": 4}


def costs(times, **columns):
    """The summary of rows a, b, ... that differ in T alone, where ``columns`` do not say otherwise."""
    fixed = {"status": "ok", "trainable_millions": 1.0, "memory_bytes": 1e9}
    names = list("abcd"[: len(times)])
    return pd.DataFrame({"label": names, "epoch_time_s": times, **fixed, **columns}, index=names)


@pytest.mark.parametrize(
    ("times", "ranks"),
    [
        ([1.0, 1.04, 1.08, 10.0], [1, 1, 3, 4]),  # within noise of the second, not of the first
        ([1.0, 1.051, 10.0], [1, 1, 3]),  # noise is a share of the larger cost
        ([1.0, 1.1, 10.0], [1, 2, 3]),
    ],
)
def test_a_row_ties_with_the_first_of_its_rank(times, ranks):
    summary = costs(times)
    frame = frame_of(summary)
    summary["tpme"] = tpme(summary, Weights(), frame)
    assert list(tied_ranks(summary, Weights(), frame, RunNoise(0.05, 0.0, "doctor"))) == ranks


def test_the_spread_over_seeds_is_pooled_and_both_of_time_and_memory_are_needed():
    summary = costs([1.0, 2.0], epoch_time_s_sd=[0.1, 0.6], memory_bytes_sd=[1e7, np.nan])
    noise = noise_of(summary, None, None)
    assert (noise.time, noise.memory) == pytest.approx((RUNS_APART * 0.05**0.5, RUNS_APART * 0.01))
    assert noise_of(summary.assign(memory_bytes_sd=np.nan), 0.1, None) == RunNoise(0.0, 0.0, "")


def test_without_a_noise_floor_the_spread_over_seeds_decides(factory):
    for seed, share in enumerate((0.9, 1.0, 1.1)):
        factory.write("lora", time=1.0 * share, seed=seed)
        factory.write("bitfit", time=1.2 * share, seed=seed)
        factory.write("fft", time=5.0 * share, seed=seed)
    section = section_of(factory)
    assert section.noise.source == "seeds"
    assert section.noise.time == pytest.approx(1.96 * np.sqrt(2) * 0.1)
    assert section.summary["tpme_rank"].to_dict() == {"lora": 1, "bitfit": 1, "fft": 3}


def test_without_noise_no_tie_is_claimed(factory):
    factory.write("lora", time=0.336)
    factory.write("bitfit", time=0.337)
    section = section_of(factory)
    assert not section.ties
    assert "no tie is claimed" in section.noise.text


def test_one_row_has_no_tpme_and_the_table_says_why(factory):
    """It would be ``0.00, 2.12-2.12, rank 1``."""
    factory.write("lora")
    factory.write("frozen")
    section = section_of(factory)
    assert section.summary[["tpme", "tpme_rank", "tpme_low"]].isna().all(axis=None)
    table = results(section)
    assert "No TPME: of one row, lora, it would be 0 whatever it costs." in table.notes
    assert "0.00" not in [entry.text for entry in table.rows[0]]


def test_an_end_of_the_scale_is_said_in_place_of_an_interval_of_no_width(factory):
    for method, time in (("fft", 20.0), ("lora", 10.0), ("iisan", 1.0)):
        factory.write(method, time=time, peak=1e8 * time)
    section = section_of(factory)
    assert section.summary["tpme_end"].to_dict() == {"iisan": True, "lora": True, "fft": True}
    texts = {row[0].text: {entry.text for entry in row} for row in scales(section).rows}
    assert "end of scale" in texts["iisan"] & texts["fft"]


def test_no_other_row_moves_the_ratios(factory):
    """T 1/4, P 1/10 and M 1/2 of full fine-tuning, weighted 0.45, 0.10, 0.45."""
    factory.write("fft", time=20.0, millions=5.0, peak=8e9)
    factory.write("lora", time=5.0, millions=0.5, peak=4e9)
    ratios = ["time_ratio", "parameters_ratio", "memory_ratio", "cost_ratio"]
    before = section_of(factory).summary.loc["lora", ratios]
    assert list(before) == pytest.approx([0.25, 0.1, 0.5, 0.25**0.45 * 0.1**0.1 * 0.5**0.45])
    factory.write("bitfit", time=90.0, millions=9.0, peak=9e10)
    section = section_of(factory)
    assert section.reference == "fft"
    assert list(section.summary.loc["lora", ratios]) == pytest.approx(list(before))
    assert list(section.summary.loc["fft", ratios]) == [1, 1, 1, 1]


def test_the_reference_of_the_ratios_is_chosen(factory):
    factory.write("lora", time=5.0)
    factory.write("bitfit", time=10.0)
    assert section_of(factory).reference is None
    assert section_of(factory).summary["cost_ratio"].isna().all()
    assert section_of(factory, reference="bitfit").summary["time_ratio"].to_dict() == {"lora": 0.5, "bitfit": 1.0}


def test_the_reference_finished_and_is_named_by_row_or_label():
    summary = costs([1.0, 2.0, 3.0], status=["timeout", "ok", "ok"], label=["fft", "lora", "lora"])
    summary = summary.set_axis(["fft", "lora [rank=8]", "lora [rank=4]"])
    assert reference_row(summary, None) is None
    assert reference_row(summary, "lora") == "lora [rank=8]"
    assert reference_row(summary, "lora [rank=4]") == "lora [rank=4]"


def test_a_cost_without_weight_does_not_count():
    """A row that trains nothing costs nothing on this scale, unless P has no weight."""
    summary = costs([4.0, 1.0], trainable_millions=[1.0, 0.0])
    assert cost_ratios(summary, "a", Weights())["cost_ratio"].to_dict() == {"a": 1.0, "b": 0.0}
    without = cost_ratios(summary, "a", Weights(time=0.5, parameters=0.0, memory=0.5))
    assert without["cost_ratio"].to_dict() == pytest.approx({"a": 1.0, "b": 0.5})


def test_a_reference_without_costs_is_refused(factory):
    factory.write("lora")
    factory.write("popularity", time=None)
    with pytest.raises(UserError, match="--reference popularity: its T, P or M is missing"):
        section_of(factory, reference="popularity")
