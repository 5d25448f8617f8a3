from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats as scipy_stats

from tpme.bench.record import read_result
from tpme.reports.data import resampling
from tpme.reports.data.resampling import DRAWS, Repeats, Resampled, draw, resample
from tpme.reports.data.stats import interval
from tpme.reports.data.tpme import DEFAULT, Frame, Span, Weights
from tpme.reports.report import make_report
from tpme.reports.tables.results import costs, results


def row(*epochs_s, memory=(1e9,), millions=1.0) -> Repeats:
    return Repeats(tuple(np.array(one, dtype=float) for one in epochs_s), np.array(memory, dtype=float), millions)


def resampled(rows: dict[str, Repeats], weights: Weights = DEFAULT, frame: Frame | None = None) -> Resampled:
    return resample({name: draw(name, one) for name, one in rows.items()}, weights, frame)


def texts(table, key: str) -> dict[str, str]:
    place = [column.key for column in table.columns].index(key)
    return {line[0].value: line[place].text for line in table.rows}


def values(table, key: str) -> dict[str, object]:
    place = [column.key for column in table.columns].index(key)
    return {line[0].value: line[place].value for line in table.rows}


times = st.lists(st.floats(0.1, 100), min_size=1, max_size=9)
repeats = st.builds(
    lambda seeds, millions: Repeats(
        tuple(np.array(epochs) for epochs, _ in seeds), np.array([memory for _, memory in seeds]), millions
    ),
    st.lists(st.tuples(times, st.floats(1e6, 1e11)), min_size=1, max_size=4),
    st.floats(0.01, 200),
)


def measured(rows: dict[str, Repeats]) -> dict[str, float]:
    """TPME as the tables compute it, by hand."""
    costs = np.array(
        [
            [np.mean([np.median(one) for one in r.epochs_s]), r.trainable_millions, r.memory_bytes.mean()]
            for r in rows.values()
        ]
    )
    reach = np.ptp(costs, axis=0)
    terms = np.divide(costs - costs.min(axis=0), reach, out=np.zeros_like(costs), where=reach > 0)
    return dict(zip(rows, terms @ np.array(DEFAULT.values), strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(repeats, min_size=1, max_size=5))
def test_an_interval_holds_its_point_and_every_draw_is_a_tpme(drawn):
    rows = {f"row {index}": one for index, one in enumerate(drawn)}
    found = resampled(rows)
    assert found.tpme.shape == found.ranks.shape == (DRAWS, len(rows))
    assert found.tpme.min() >= -1e-9
    assert found.tpme.max() <= 1 + 1e-9
    for name, value in measured(rows).items():
        low, high = found.interval(name, value)
        assert low <= value <= high
        best, worst = found.rank_interval(name)
        assert 1 <= best <= worst <= len(rows)
    assert (found.ranks.min(axis=1) == 1).all(), "in every draw somebody is first"


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.integers(1, 4), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_constant_times_and_memory_give_intervals_without_width(one, other, seeds, epochs):
    rows = {
        "a": row(*[[one] * epochs] * seeds, memory=[2e9] * seeds),
        "b": row(*[[other] * epochs] * seeds, memory=[3e9] * seeds, millions=5.0),
        "c": row(*[[1.0] * epochs] * seeds, memory=[7e9] * seeds, millions=2.0),
    }
    found = resampled(rows)
    for name, value in measured(rows).items():
        assert found.interval(name, value) == pytest.approx((value, value), abs=1e-12)
    assert (found.ranks == found.ranks[0]).all()


def test_rows_with_overlapping_times_share_ranks_and_rows_apart_do_not():
    rows = {
        "fast": row([1.0, 1.1, 1.05, 0.95]),
        "one": row([9.0, 11.0, 10.0, 10.6, 9.6]),
        "other": row([9.2, 10.9, 10.1, 10.4, 9.5]),
        "slow": row([20.0, 20.5, 19.8]),
    }
    found = resampled(rows)
    fast, one, other, slow = found.ranks.T
    assert (fast == 1).all()
    assert (slow == 4).all()
    for ranks in (one, other):
        assert np.mean(ranks == 2) > 0.2
        assert np.mean(ranks == 3) > 0.2
    assert found.rank_interval("one") == found.rank_interval("other") == (2, 3)
    assert found.rank_interval("fast") == (1, 1)


def test_equal_rows_share_the_better_rank():
    found = resampled({"a": row([1.0, 1.0]), "b": row([1.0, 1.0]), "c": row([2.0, 2.0])})
    assert (found.ranks == [1, 1, 3]).all()


def test_medians_are_distributed_as_those_of_samples_really_drawn():
    generator = np.random.default_rng(0)
    for n in (1, 2, 3, 7, 8, 40):
        of = generator.lognormal(0, 1, n)
        drawn = np.median(generator.choice(of, (40_000, n)), axis=1)
        samples = [np.array([-5.0, -6.0]), of]
        told = resampling._medians(samples, np.ones((200, 200), dtype=int), generator).ravel()
        shares = np.linspace(0.05, 0.95, 19)
        between = [np.mean(told <= edge) - np.mean(drawn <= edge) for edge in np.quantile(drawn, shares)]
        assert np.abs(between).max() < 0.02, n


def test_the_interval_of_a_time_is_scipys_percentile_bootstrap_of_the_median():
    times_s = np.random.default_rng(1).lognormal(0, 0.5, 101)
    expected = scipy_stats.bootstrap((times_s,), np.median, method="percentile", n_resamples=20_000, rng=2)
    found = interval(draw("row", row(times_s))[:, 0])
    assert found == pytest.approx(tuple(expected.confidence_interval), rel=0.02)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 4)))
def test_ranks_of_a_draw_are_scipys_with_the_better_rank_for_ties(values):
    assert (resampling._ranks(values) == scipy_stats.rankdata(values, method="min", axis=1)).all()


def test_time_and_memory_of_a_seed_stay_together():
    """The slower seed takes less memory by as much: whichever is drawn, the sum of the terms is the same."""
    together = {"a": row([10.0], [20.0], memory=[4e9, 2e9]), "b": row([0.0]), "c": row([30.0], memory=[7e9])}
    found = resampled(together, Weights(time=0.5, parameters=0, memory=0.5))
    assert found.tpme[:, 0] == pytest.approx(np.full(DRAWS, 5 / 12))


def test_seeds_are_resampled_too():
    apart, alike = ([10.0, 10.0], [20.0, 20.0]), ([15.0, 15.0], [15.0, 15.0])
    edges = {"low": row([0.0, 0.0]), "high": row([30.0, 30.0], millions=2.0)}
    low, high = resampled({"row": row(*apart, memory=[1e9, 1e9]), **edges}).interval("row", 0.225)
    assert (low, high) == pytest.approx((0.15, 0.3))
    assert resampled({"row": row(*alike, memory=[1e9, 1e9]), **edges}).interval("row", 0.225) == pytest.approx(
        (0.225, 0.225)
    )


def test_a_frozen_frame_stays_and_lets_values_leave_it():
    frame = Frame(
        epoch_time_s=Span(min=0, max=10), trainable_millions=Span(min=0, max=1), memory_bytes=Span(min=0, max=1e9)
    )
    found = resampled({"slow": row([18.0, 20.0, 22.0])}, Weights(time=1, parameters=0, memory=0), frame)
    assert found.interval("slow", 2.0) == pytest.approx((1.8, 2.2))
    assert resampled({"slow": row([18.0, 20.0, 22.0])}).interval("slow", 0.0) == (0, 0)


def test_the_same_rows_give_the_same_draws_and_another_row_leaves_them_alone():
    rows = {"a": row([1.0, 2.0, 3.0]), "b": row([5.0, 6.0, 9.0])}
    first = resampled(rows)
    assert (resampled(dict(reversed(rows.items()))).tpme[:, ::-1] == first.tpme).all()
    between = resampled(rows | {"c": row([4.0])})
    assert between.tpme[:, :2] == pytest.approx(first.tpme)


# --- in a report ---------------------------------------------------------------------------------------------


def with_times(path, times_s: list[float]) -> None:
    """Give a made-up record other epoch times."""
    result = read_result(path)
    epochs = [epoch.model_copy(update={"train_s": t}) for epoch, t in zip(result.epochs, times_s, strict=True)]
    reading = result.epoch_time_s.model_copy(update={"value": float(np.median(times_s[1:]))})
    changed = {"epochs": tuple(epochs), "epoch_time_s": reading, "warmup_epochs": 1}
    path.write_text(result.model_copy(update=changed).model_dump_json())


def test_the_table_of_costs_carries_the_interval_of_the_epoch_time(factory):
    with_times(factory.write("fft", time=20.0), [99.0, 20.0, 20.0, 20.0])
    with_times(factory.write("id", time=10.0), [99.0, 8.0, 10.0, 12.0])  # no TPME, but an epoch time
    factory.write("popularity", time=None)
    [section] = make_report([factory.root]).sections
    table = costs(section)
    assert values(table, "epoch_time_s_low") == {"fft": 20.0, "id": 8.0, "popularity": None}
    assert values(table, "epoch_time_s_high") == {"fft": 20.0, "id": 12.0, "popularity": None}
    assert texts(table, "epoch_time_s_low") == {"fft": "20.0–20.0", "id": "8.00–12.0", "popularity": "–"}


def test_the_table_of_results_carries_the_interval(factory):
    with_times(factory.write("fft", time=20.0, peak=9e9), [99.0, 20.0, 20.0, 20.0])
    with_times(factory.write("lora", time=10.0, peak=5e9), [99.0, 8.0, 10.0, 12.0])
    with_times(factory.write("iisan", time=1.0, peak=1e9), [99.0, 1.0, 1.0, 1.0])
    [section] = make_report([factory.root]).sections
    table = results(section)
    lora = values(table, "tpme_percent")["lora"]
    low, high = (values(table, f"tpme_{end}_percent")["lora"] for end in ("low", "high"))
    # T of 8 to 12 s in a frame of 1 to 20 s, the warm-up epoch left out, moves TPME by 0.45 * 2 / 19 to either side.
    assert (lora - low, high - lora) == pytest.approx((45 * 2 / 19, 45 * 2 / 19))
    assert texts(table, "tpme_low_percent")["lora"] == f"{low:.2f}–{high:.2f}"
    assert texts(table, "tpme_low_percent")["iisan"] == "end of scale"
    assert "95 %" in [column.title for column in table.columns]
    [note] = [note for note in table.notes if note.startswith("95 %")]
    assert "every row's epochs, the frame taken anew" in note
    assert "One seed a row" in note


def test_what_was_not_repeated_has_no_interval_and_seeds_are_named(factory):
    path = factory.write("fft", time=20.0)
    result = read_result(path)
    path.write_text(result.model_copy(update={"epochs": result.epochs[:1]}).model_dump_json())
    for seed in (1, 2):
        factory.write("lora", time=10.0 + seed, seed=seed)
    [section] = make_report([factory.root]).sections
    table = results(section)
    assert texts(table, "tpme_low_percent") == {"lora": "end of scale", "fft": "–"}
    [note] = [note for note in table.notes if note.startswith("95 %")]
    assert "every row's seeds and epochs" in note
    assert "Of one seed (fft)" in note


def test_rows_without_a_tpme_have_no_interval(demo_run):
    [section] = make_report([demo_run]).sections
    bounds = texts(results(section), "tpme_low_percent")
    assert {name for name, text in bounds.items() if text != "–"} == set(section.compared)
    assert section.resampled.rows == tuple(section.compared)
