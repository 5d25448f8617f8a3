"""Two sets of results: what is compared, what is told apart, and what is said of the rest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpme.bench.cli import main
from tpme.bench.record import Flag, Reading, Training, read_result
from tpme.reports.compare import compare
from tpme.reports.compare_tables import sentences, tables, to_json

ROOT = Path(__file__).resolve().parents[2]
SPREAD = (0.9, 1.0, 1.1)
"""Times of three seeds, relative."""


@pytest.fixture
def two(make_factory, tmp_path):
    return make_factory(tmp_path / "a"), make_factory(tmp_path / "b")


def write_seeds(factory, method: str, time: float, **changes) -> None:
    for seed, share in enumerate(SPREAD, start=1):
        factory.write(method, time=time * share, seed=seed, **changes)


def only_pair(two):
    [pair] = compare(two[0].root, two[1].root).pairs
    return pair


def outcomes(pair, key: str) -> dict[str, str]:
    return {row.a: change.outcome for row in pair.rows if (change := row.change(key))}


def count(path, **values: float) -> None:
    counters = {name: Reading(value=value, source="test") for name, value in values.items()}
    path.write_text(read_result(path).model_copy(update={"counters": counters}).model_dump_json())


# --- costs ---------------------------------------------------------------------------------------------------


def test_a_large_change_of_a_cost_is_told_apart_and_a_small_one_is_not(two):
    write_seeds(two[0], "lora", 10, peak=2e9, millions=1.0)
    write_seeds(two[1], "lora", 15, peak=1e9, millions=1.5)
    write_seeds(two[0], "fft", 20)
    write_seeds(two[1], "fft", 20.5)
    pair = only_pair(two)
    assert outcomes(pair, "epoch_time_s") == {"lora": "higher", "fft": "not told apart"}
    assert outcomes(pair, "trainable_millions") == {"lora": "higher", "fft": "equal"}
    [lora] = [row for row in pair.rows if row.a == "lora"]
    time, memory, peak = (lora.change(key) for key in ("epoch_time_s", "memory_bytes", "peak_bytes"))
    assert (time.a, time.b, time.effect) == pytest.approx((10, 15, 1.5))
    assert 1.2 < time.low < 1.4
    assert 1.6 < time.high < 1.9
    assert memory.effect == peak.effect == pytest.approx(0.5)
    assert {memory.outcome, peak.outcome} == {"lower"}
    said = "\n".join(sentences(pair))
    assert "T (epoch time): B is slower in 1 of 2 rows (lora +50 % [" in said
    assert "not told apart in 1 of 2 rows" in said
    assert not {"pass", "fail", "regress", "improve", "better", "worse"} & set(said.lower().split())


def test_the_draws_of_the_two_sides_are_independent(two):
    """Draws that depend on the row's name alone would move together, and the ratio would have no interval."""
    write_seeds(two[0], "lora", 10.0)
    write_seeds(two[1], "lora", 10.1)
    change = only_pair(two).rows[0].change("epoch_time_s")
    assert change.low < 0.95
    assert change.high > 1.05


def test_one_run_a_side_is_unclear_until_noise_is_known(two):
    paths = [two[0].write("lora", time=10, peak=1.0e9), two[1].write("lora", time=10.4, peak=1.2e9)]
    pair = only_pair(two)
    assert outcomes(pair, "epoch_time_s") == outcomes(pair, "memory_bytes") == {"lora": "unclear"}
    assert any("unclear, for a side ran once" in text for text in sentences(pair))
    for path in paths:
        count(path, noise_time_ratio=0.05, noise_memory_ratio=0.01)
    pair = only_pair(two)
    assert outcomes(pair, "epoch_time_s") == {"lora": "not told apart"}
    assert outcomes(pair, "memory_bytes") == outcomes(pair, "peak_bytes") == {"lora": "higher"}


def test_the_spread_over_seeds_of_one_side_stands_for_the_noise_of_a_single_run(two):
    write_seeds(two[0], "lora", 10)
    two[1].write("lora", time=12, seed=1)
    two[0].write("fft", time=10, seed=1)
    two[1].write("fft", time=20, seed=1)
    assert outcomes(only_pair(two), "epoch_time_s") == {"lora": "not told apart", "fft": "higher"}


def test_a_doubtful_time_is_not_compared_and_says_why(two):
    two[0].write(
        "lora", time=10, time_reading=Reading(value=10, source="clock", valid=False, reason="it was throttled")
    )
    two[1].write("lora", time=20)
    change = only_pair(two).rows[0].change("epoch_time_s")
    assert (change.outcome, change.effect) == ("not compared", None)
    assert change.reason == "missing or not to be trusted in A: it was throttled"


def test_doubtful_memory_is_not_compared_and_neither_is_the_peak(two, spoil_memory):
    two[0].write("lora")
    spoil_memory(two[1].write("lora"), "another process used the device")
    [row] = only_pair(two).rows
    for key in ("memory_bytes", "peak_bytes"):
        assert row.change(key).reason == "missing or not to be trusted in B: another process used the device"


def test_the_peak_of_a_row_that_trained_nothing_is_compared(two):
    for side in two:
        side.write("popularity", time=None, peak=None)
    assert outcomes(only_pair(two), "peak_bytes") == {"popularity": "equal"}


def test_exact_counters_that_differ_are_shown(two):
    count(two[0].write("lora"), forward_flops=1e9, backward_flops=2e9)
    count(two[1].write("lora"), forward_flops=1.5e9, backward_flops=2e9)
    pair = only_pair(two)
    shown = tables(pair)[-1]
    assert [[entry.text for entry in row] for row in shown.rows] == [
        ["lora", "forward FLOPs of a step", "1 GFLOP", "1.5 GFLOP", "+50 %"]
    ]


# --- quality -------------------------------------------------------------------------------------------------


def test_quality_is_paired_over_users(two):
    two[0].write("lora", skill=0.1)
    two[1].write("lora", skill=0.5)
    two[0].write("fft", skill=0.3)
    two[1].write("fft", skill=0.3)
    pair = only_pair(two)
    assert outcomes(pair, "recall_10") == outcomes(pair, "ndcg_10") == {"lora": "higher", "fft": "equal"}
    [lora] = [row for row in pair.rows if row.a == "lora"]
    recall = lora.change("recall_10")
    assert recall.effect == pytest.approx(recall.b - recall.a)
    assert 0 < recall.low < recall.effect < recall.high
    assert recall.p < 0.05


def test_quality_of_random_weights_is_not_compared(two):
    flag = Flag(code="random-weights", message="random")
    two[0].write("lora", flags=(flag,))
    two[1].write("lora")
    change = only_pair(two).rows[0].change("ndcg_10")
    assert change.outcome == "not compared"
    assert "random weights" in change.reason


# --- what is compared ----------------------------------------------------------------------------------------


def test_another_device_leaves_parameters_counters_and_quality(two):
    count(two[0].write("lora", time=10, millions=1.0), forward_flops=1e9)
    count(two[1].write("lora", time=1, millions=2.0, device_key="cpu: another", skill=0.5), forward_flops=2e9)
    pair = only_pair(two)
    for key in ("epoch_time_s", "memory_bytes", "peak_bytes"):
        change = pair.rows[0].change(key)
        assert (change.outcome, change.effect, change.reason) == ("not compared", None, "other device")
    assert outcomes(pair, "trainable_millions") == outcomes(pair, "forward_flops") == {"lora": "higher"}
    assert outcomes(pair, "recall_10") == {"lora": "higher"}
    assert "T (epoch time): not compared (other device)." in sentences(pair)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dataset_fingerprint": "cd" * 32}, "other data"), ({"protocol": "paper"}, "other protocol")],
)
def test_other_data_and_protocols_leave_what_the_model_alone_decides(two, changes, reason):
    count(two[0].write("lora"), forward_flops=1e9, weight_bytes=5)
    count(two[1].write("lora", time=20, millions=2.0, **changes), forward_flops=2e9, weight_bytes=6)
    pair = only_pair(two)
    for key in ("epoch_time_s", "recall_10", "ndcg_10"):
        assert pair.rows[0].change(key).reason == reason
    assert outcomes(pair, "trainable_millions") == outcomes(pair, "weight_bytes") == {"lora": "higher"}
    assert outcomes(pair, "forward_flops") == {}


def test_rows_and_groups_of_one_side_are_listed(two, make_factory):
    two[0].write("lora")
    two[0].write("fft")
    two[1].write("lora")
    two[1].write("lora", options={"rank": 4})
    make_factory(two[1].root / "elsewhere").write("lora", device_key="cpu: another")
    sets = compare(two[0].root, two[1].root)
    [pair] = sets.pairs
    assert ([(row.a, row.b) for row in pair.rows], pair.only_a, pair.only_b) == (
        [("lora", "lora")], ("fft",), ("lora [rank=4]",)
    )  # fmt: skip
    assert {"Only in A: fft.", "Only in B: lora [rank=4]."} <= set(sentences(pair))
    assert [section.group.key["device_key"] for section in sets.only_b] == ["cpu: another"]


def test_settings_that_differ_are_named(two):
    two[0].write("lora", training=Training(epochs=8))
    two[1].write("lora", training=Training(epochs=16), code="1234567890abcdef")
    pair = only_pair(two)
    assert pair.rows[0].differs == {"training.epochs": ("8", "16"), "code version": ("c0ffee1", "1234567")}
    assert sentences(pair)[0] == "Differs in settings: training.epochs 8 in A, 16 in B (lora); code version (lora)."


def test_the_same_training_is_matched_before_another(two):
    for factory in two:
        for epochs in (8, 16):
            factory.write("lora", training=Training(epochs=epochs), time=epochs)
    assert outcomes(only_pair(two), "epoch_time_s") == dict.fromkeys(("lora", "lora [epochs=16]"), "equal")


def test_two_record_files_are_compared_whatever_they_are(two):
    a, b = two[0].write("lora"), two[1].write("fft", millions=4.0)
    [pair] = compare(a, b).pairs
    assert pair.rows[0].differs["label"] == ("lora", "fft")
    assert outcomes(pair, "trainable_millions") == {"lora": "higher"}


def test_a_row_that_failed_says_so(two):
    two[0].write("lora")
    two[1].write("lora", status="oom")
    assert "Not compared: lora: it ended ok in A, oom in B." in sentences(only_pair(two))


def test_a_run_against_itself_is_equal_in_everything(demo_run):
    for pair in compare(demo_run, demo_run).pairs:
        told = {change.outcome for row in pair.rows for change in row.changes if change.key != "status"}
        assert told == {"equal"}
        assert tables(pair) == []


# --- the command ---------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["tpme", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_a_difference_is_no_failure(two, monkeypatch, capsys):
    write_seeds(two[0], "lora", 10)
    write_seeds(two[1], "lora", 90, skill=0.01)
    monkeypatch.setenv("COLUMNS", "80")
    two[1].write("fft", device_key="cpu: another, with a name")
    assert run(monkeypatch, two[0].root, two[1].root) == 0
    out = capsys.readouterr().out
    assert "B is slower (lora ×9 [" in out
    assert max(map(len, out.splitlines()[2:])) <= 80  # after the paths


def test_every_difference_of_quality_has_its_interval_in_80_columns(two, monkeypatch, capsys):
    for factory, skill in zip(two, (0.2, 0.6), strict=True):
        for method, quality in (("lora", skill), ("iisan-versa", 0.3 + skill / 20)):
            factory.write(method, skill=quality, cached=method != "lora")
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, two[0].root, two[1].root) == 0
    table = capsys.readouterr().out.split("\nRecall@10\n")[1].split("NDCG@10")[0]
    rows = [line for line in table.splitlines() if line.startswith((" lora", " iisan"))]
    assert len(rows) == 2
    assert all("[" in row for row in rows)
    assert "not told apart" in table


def test_json(two, monkeypatch, capsys):
    two[0].write("lora", time=10)
    two[1].write("lora", time=12)
    two[1].write("fft")
    assert run(monkeypatch, two[0].root, two[1].root, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    [group] = content["groups"]
    assert group["only_b"] == ["fft"]
    [time] = [change for change in group["rows"][0]["changes"] if change["key"] == "epoch_time_s"]
    assert (time["a"], time["b"], time["effect"], time["outcome"]) == (10, 12, 1.2, "unclear")
    assert content == json.loads(to_json(compare(two[0].root, two[1].root)))


def test_what_the_documentation_shows_is_what_the_records_give(tmp_path):
    """Line by line; three dots stand for lines that are left out."""
    (tmp_path / "runs").symlink_to(ROOT / "results")
    text = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
    command, shown = re.findall(r"```\n\$ (tpme compare .*)\n([^`]*)```", text)[0]
    done = subprocess.run(
        [sys.executable, "-m", "tpme.bench.cli", *command.split()[1:]],
        cwd=tmp_path, env=os.environ | {"COLUMNS": "100"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
    pattern = r"(.*\n)*?".join(map(re.escape, re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)))
    assert re.fullmatch(pattern, printed), f"{command} prints now:\n{printed}"


def test_bad_input_is_one_line_and_exit_code_2(two, tmp_path):
    two[0].write("lora")
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong in (tmp_path / "missing", empty):
        command = [sys.executable, "-m", "tpme.bench.cli", "compare", str(two[0].root), str(wrong)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"tpme: {wrong}")
        assert len(done.stderr.splitlines()) == 1
