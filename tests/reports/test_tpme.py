from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpme.bench.errors import UserError
from tpme.reports.data.tpme import Weights, frame_of, lower_bound, pareto, read_frames, tpme, write_frames

NAMES = ["fft", "adapter", "lora", "bitfit", "iisan", "iisan (cached)"]
GOLDEN = pd.DataFrame(
    {
        "epoch_time_s": [443.0, 354, 378, 403, 179, 22],
        "trainable_millions": [194.897216, 4.965440, 0.796736, 0.412736, 4.113877, 4.113877],
        "memory_bytes": np.array([46.76, 37.82, 39.07, 36.97, 8.32, 3.11]) * 1e9,
    },
    index=NAMES,
)


def test_golden_triple():
    assert (100 * tpme(GOLDEN)).round(2).tolist() == [100.00, 71.50, 75.14, 75.63, 22.34, 0.19]


def test_units_do_not_matter():
    scaled = GOLDEN * [1000, 1e6, 1e-9]
    assert tpme(scaled).to_numpy() == pytest.approx(tpme(GOLDEN).to_numpy(), abs=1e-12)


def test_dropping_a_row_moves_the_others_unless_the_frame_is_frozen():
    fewer = GOLDEN.drop("iisan (cached)")
    assert tpme(fewer)["lora"] != pytest.approx(tpme(GOLDEN)["lora"])
    assert tpme(fewer, frame=frame_of(GOLDEN))["lora"] == pytest.approx(tpme(GOLDEN)["lora"])


def test_a_new_row_beyond_a_frozen_frame_goes_beyond_it():
    new = GOLDEN.iloc[[0]] * 2
    assert tpme(new, frame=frame_of(GOLDEN)).item() > 1


def test_a_column_without_spread_adds_nothing():
    same = GOLDEN.assign(epoch_time_s=5.0)
    assert tpme(same)["fft"] == pytest.approx(0.55)
    assert tpme(same, (1.0, 0.0, 0.0)).eq(0).all()


def test_one_row_gets_zero():
    assert tpme(GOLDEN.iloc[[2]]).tolist() == [0.0]


def test_unfinished_and_doubtful_rows_do_not_shape_the_frame():
    df = GOLDEN.assign(status="ok", epoch_time_valid=True, memory_valid=True)
    worse = GOLDEN.iloc[[0]] * 100
    extra = pd.concat(
        [
            df,
            worse.assign(status="timeout", epoch_time_valid=True, memory_valid=True).rename(index={"fft": "slow"}),
            worse.assign(status="ok", epoch_time_valid=True, memory_valid=False).rename(index={"fft": "shared gpu"}),
            worse.assign(status="ok", epoch_time_valid=True, memory_valid=True, memory_bytes=np.nan).rename(
                index={"fft": "unknown"}
            ),
        ]
    )
    result = tpme(extra)
    assert result[NAMES].to_numpy() == pytest.approx(tpme(GOLDEN).to_numpy())
    assert result[["slow", "shared gpu", "unknown"]].isna().all()
    assert frame_of(extra) == frame_of(df)


def test_no_row_at_all():
    df = GOLDEN.assign(status="error")
    assert frame_of(df) is None
    assert tpme(df).isna().all()


def test_out_of_memory_gets_a_lower_bound():
    df = GOLDEN.assign(status="ok", memory_seen_bytes=GOLDEN["memory_bytes"])
    df.loc["dyt"] = [np.nan, 3.0, np.nan, "oom", 80e9]
    bound = lower_bound(df)
    frame = frame_of(df)
    assert frame is not None
    assert "dyt" not in frame.rows
    m = (80e9 - 3.11e9) / (46.76e9 - 3.11e9)
    p = (3.0 - 0.412736) / (194.897216 - 0.412736)
    assert bound["dyt"] == pytest.approx(0.10 * p + 0.45 * m)
    assert bound.drop("dyt").isna().all()
    # Had it finished with the memory seen and any time, it could not have done better in that frame.
    for time in (22.0, 100.0, 443.0):
        finished = tpme(pd.DataFrame([[time, 3.0, 80e9]], columns=GOLDEN.columns), frame=frame).item()
        assert finished >= bound["dyt"] - 1e-12


rows = st.lists(st.tuples(*[st.floats(0.01, 1e4)] * 3), min_size=2, max_size=8)


@given(rows, st.floats(0, 1), st.floats(0, 1))
def test_tpme_equals_its_formula(values, a, b):
    a, b = sorted((a, b))
    weights = (a, b - a, 1 - b)
    df = pd.DataFrame(values, columns=GOLDEN.columns)
    expected = []
    for row in values:
        total = 0.0
        for index, weight in enumerate(weights):
            column = [other[index] for other in values]
            if max(column) > min(column):
                total += weight * (row[index] - min(column)) / (max(column) - min(column))
        expected.append(total)
    result = tpme(df, weights)
    assert result.tolist() == pytest.approx(expected, abs=1e-9)
    assert result.between(-1e-9, 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.5,0.5,0.5", "add up to 1.5"),
        ("1,0", "three numbers"),
        ("a,b,c", "three numbers"),
        ("2,-1,0", "less than"),
        ("nan,0,1", "weights .nan"),
    ],
)
def test_weights_that_make_no_sense_are_refused(text, said):
    with pytest.raises(UserError, match=said) as caught:
        Weights.parse(text)
    assert "\n" not in str(caught.value)


def test_weights_are_read():
    assert Weights.parse("0.2, 0.3,0.5").values == (0.2, 0.3, 0.5)
    assert str(Weights.parse("0.45,0.10,0.45")) == "0.45,0.1,0.45"
    assert Weights.parse("0.1,0.2,0.7") is not None  # they add up to 1 but for rounding


def test_frames_survive_their_file(tmp_path):
    frame = frame_of(GOLDEN, {"device_key": "x"})
    assert frame is not None
    write_frames(tmp_path / "frame.json", [frame])
    assert read_frames(tmp_path / "frame.json") == [frame]
    assert frame.rows == tuple(NAMES)


@pytest.mark.parametrize("change", ["max below min", "unknown field", "other version", "no json", "absent"])
def test_a_bad_frame_is_named_in_one_line(tmp_path, change):
    path = tmp_path / "frame.json"
    frame = frame_of(GOLDEN)
    assert frame is not None
    write_frames(path, [frame])
    raw = json.loads(path.read_text())
    if change == "max below min":
        raw["frames"][0]["epoch_time_s"]["max"] = -1
    if change == "unknown field":
        raw["frames"][0]["surprise"] = 1
    if change == "other version":
        raw["schema_version"] = 7
    path.write_text("]" if change == "no json" else json.dumps(raw))
    if change == "absent":
        path.unlink()
    with pytest.raises(UserError, match=r"frame\.json") as caught:
        read_frames(path)
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_pareto_equals_comparing_all_pairs(points):
    df = pd.DataFrame(points, columns=["tpme", "recall_10"])
    expected = [
        not any((c <= cost and q >= quality) and (c < cost or q > quality) for c, q in points)
        for cost, quality in points
    ]
    assert pareto(df).tolist() == expected


def test_pareto_leaves_out_what_is_missing():
    df = pd.DataFrame({"tpme": [0.1, np.nan], "recall_10": [0.2, 0.9]})
    assert pareto(df).tolist() == [True, False]
