"""The gate: what counts as a change, what may be compared, and what a baseline keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Reading, read_result, write_result
from tpme.reports.data.stats import student_t
from tpme.reports.gate.baseline import (
    Baseline,
    from_records,
    load_baseline,
    load_runs,
    read_baseline,
    updated,
    write_baseline,
)
from tpme.reports.gate.check import judge
from tpme.reports.gate.measures import SAMPLE, cell_key, read_records
from tpme.reports.gate.verdict import WORSE, CellVerdict, Comparison, GateReport, Policy, conclude

Make = Callable[..., Any]


def counted(path: Path, **counters: float) -> Path:
    """The record at ``path`` with exact counters, as the counting on meta leaves them."""
    raw = json.loads(path.read_text())
    raw["counters"] |= {name: {"value": value, "source": "one step on meta"} for name, value in counters.items()}
    path.write_text(json.dumps(raw))
    return path


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def report_of(base: Path, head: Path, **policy: Any) -> GateReport:
    rules = Policy(**policy)
    sides = load_baseline(base), load_runs([head])
    cells = judge(*sides, rules)
    return conclude(cells, rules, command="check", base=str(base), head=str(head), duration_s=0.0)


def verdicts(report: GateReport) -> dict[str, str]:
    """Verdict by metric, of a report of one cell."""
    (cell,) = report.cells
    return {one.metric: one.verdict for one in cell.comparisons}


def one(report: GateReport, metric: str) -> Comparison:
    (found,) = [c for cell in report.cells for c in cell.comparisons if c.metric == metric]
    return found


@pytest.fixture
def sides(make_factory: Make, tmp_path: Path) -> tuple[Any, Any]:
    """Two runs of the same matrix: factories of the base and of the head."""
    return make_factory(tmp_path / "base"), make_factory(tmp_path / "head")


def test_the_same_runs_are_the_same(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    head.write("lora", code="another version")
    report = report_of(base.root, head.root)
    assert set(verdicts(report).values()) - {"not compared"} == {"same"}
    assert (report.overall, report.exit_code) == ("fine", 0)
    assert report.compared["time"] == 1
    assert report.compared["quality"] == 2


@pytest.mark.parametrize(
    ("change", "metric", "verdict"),
    [
        ({"millions": 1.000001}, "trainable_parameters", "regressed"),
        ({"millions": 0.5}, "trainable_parameters", "improved"),
        ({"time": 12.0}, "step_s", "slower"),
        ({"time": 8.0}, "step_s", "faster"),
        ({"time": 10.5}, "step_s", "same"),
        ({"peak": 2.2e9}, "host_rss_bytes", "regressed"),
        ({"peak": 1.8e9}, "host_rss_bytes", "improved"),
        ({"peak": 2.05e9}, "host_rss_bytes", "same"),
        ({"skill": 0.01}, "recall_10", "regressed"),
        ({"skill": 0.5}, "ndcg_10", "improved"),
    ],
)
def test_each_kind_of_change_is_told(sides: tuple[Any, Any], change: dict[str, Any], metric: str, verdict: str) -> None:
    base, head = sides
    base.write("lora")
    head.write("lora", code="n", **change)
    report = report_of(base.root, head.root)
    assert verdicts(report)[metric] == verdict
    assert report.exit_code == (1 if verdict in WORSE else 0)


def test_counters_are_exact_and_a_method_s_own_are_only_told(sides: tuple[Any, Any]) -> None:
    base, head = sides
    counted(base.write("lora"), saved_bytes=1000, forward_flops=5000)
    path = counted(head.write("lora", code="n"), saved_bytes=1001, forward_flops=5000)
    edited(path, lambda raw: raw["counters"].update(ranks_kept={"value": 3.0, "source": "report() of lora"}))
    report = report_of(base.root, head.root)
    found = verdicts(report)
    assert found["saved_bytes"] == "regressed"
    assert found["forward_flops"] == "same"
    assert found["ranks_kept"] == "not compared"
    first = next(base.root.rglob("attempt-1.json"))
    edited(first, lambda raw: raw["counters"].update(ranks_kept={"value": 9.0, "source": "report() of lora"}))
    assert verdicts(report_of(base.root, head.root))["ranks_kept"] == "changed"


def test_the_steps_of_a_run_that_validation_stopped_are_not_exact(sides: tuple[Any, Any]) -> None:
    base, head = sides
    for factory in sides:  # the factory's cells run 4 epochs
        factory.write("stopped")
        factory.write("whole", training={"epochs": 4})
    base_cells = load_baseline(base.root).cells.values()
    steps = {measured.cell.method: "steps" in measured.counters for measured in base_cells}
    assert steps == {"stopped": False, "whole": True}
    assert one(report_of(base.root, head.root), "steps").verdict == "same"


def test_allocated_memory_is_tight_and_reserved_memory_is_not_judged(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora", device="cuda", device_key="gpu", peak=1e9)
    path = head.write("lora", device="cuda", device_key="gpu", peak=1e9, code="n")
    edited(path, lambda raw: raw["training_memory"]["torch_reserved_bytes"].update(value=2e9))
    assert verdicts(report_of(base.root, head.root))["torch_allocated_bytes"] == "same"
    edited(path, lambda raw: raw["training_memory"]["torch_allocated_bytes"].update(value=0.8e9 * 1.02))
    report = report_of(base.root, head.root)
    assert one(report, "torch_allocated_bytes").verdict == "regressed"
    assert "host_rss_bytes" not in verdicts(report)


# --- time --------------------------------------------------------------------------------------------------------


def with_steps(path: Path, step_s: list[float]) -> None:
    """Replace the step times of a record; all belong to one epoch."""
    file = path.parent / json.loads(path.read_text())["files"]["samples"]
    with np.load(file) as old:
        arrays = dict(old)
    np.savez(file, **arrays | {"step_s": np.array(step_s), "step_epoch": np.ones(len(step_s), dtype=int)})


def test_few_steps_are_not_tested_at_all(sides: tuple[Any, Any]) -> None:
    base, head = sides
    with_steps(base.write("lora"), [1.0] * 7)  # the first step is not counted
    with_steps(head.write("lora", code="n"), [3.0] * 7)
    found = one(report_of(base.root, head.root), "step_s")
    assert found.verdict == "not compared"  # 2 / C(12, 6) = 0.0022 can never be below 0.002
    with_steps(next(head.root.rglob("attempt-1.json")), [3.0] * 8)
    assert one(report_of(base.root, head.root), "step_s").verdict == "slower"


def test_a_large_effect_needs_the_test_and_a_sure_test_needs_the_effect(sides: tuple[Any, Any]) -> None:
    base, head = sides
    rng = np.random.default_rng(0)
    first, second = base.write("lora"), head.write("lora", code="n")
    with_steps(first, list(np.linspace(1, 4, 12)))
    with_steps(second, list(np.linspace(1.4, 4.6, 12)))  # 20 % and no proof
    found = one(report_of(base.root, head.root), "step_s")
    assert found.ratio is not None
    assert found.ratio > 1.1
    assert found.p is not None
    assert (found.verdict, found.p > 0.002) == ("inconclusive", True)
    assert found.advice is not None
    assert found.advice.startswith("not even 10 times as many steps would settle it, they vary too much")
    with_steps(first, list(1 + 0.01 * rng.random(300)))
    with_steps(second, list(1.06 + 0.01 * rng.random(300)))  # proven, and too small to matter
    found = one(report_of(base.root, head.root), "step_s")
    assert found.p is not None
    assert (found.verdict, found.p < 1e-9) == ("same", True)


@pytest.mark.parametrize(
    ("times", "repeats", "widened", "later", "verdict"),
    [
        ((10.0, 11.5, 10.6), 1, 3.853, 13.7, "not compared"),  # a slow moment: three runs do not know how slow one is
        ((10.0, 11.0, 10.5), 1, 3.853, 12.7, "same"),  # within the noise
        ((10.0, 10.1, 10.05), 1, 3.853, 12.0, "slower"),
        ((10.0, 11.5, 10.6), 8, 1.134, 13.7, "slower"),  # sixteen repeats beyond the first ones do
    ],
)
def test_the_noise_of_repeats_raises_the_bar_and_few_repeats_more(
    make_factory: Make,
    tmp_path: Path,
    times: Sequence[float],
    repeats: int,
    widened: float,
    later: float,
    verdict: str,
) -> None:
    runs = [tmp_path / f"run{number}" for number in range(len(times))]
    for run, time in zip(runs, times, strict=True):
        for seed in range(1, repeats + 1):
            make_factory(run).write("lora", time=time, seed=seed)
    baseline = from_records(runs)
    (device,) = baseline.devices.values()
    assert device.noise.time == pytest.approx(widened * (max(times) / min(times) - 1), rel=0.15)
    assert device.noise.pairs == 3 * repeats
    write_baseline(baseline, tmp_path / "baseline.json")
    head = make_factory(tmp_path / "head")
    head.write("lora", time=later, code="n")
    found = one(report_of(tmp_path / "baseline.json", head.root), "step_s")
    assert found.verdict == verdict
    assert found.bound == max(0.1, device.noise.time)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 63.657), (10, 3.1693), (11, 3.1058), (30, 2.7500), (1e9, 2.5758)]
)
def test_student_t(freedom: float, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=0.005)


def test_without_repeats_the_epochs_tell_the_noise(factory: Any) -> None:
    factory.write("lora")
    (device,) = from_records([factory.root]).devices.values()
    assert device.noise.time == 0.0  # the factory's epochs take equally long
    assert "single runs" in device.noise.source


def test_a_floor_that_a_record_carries_raises_the_bar_of_a_single_run(sides: tuple[Any, Any]) -> None:
    base, head = sides
    path = base.write("lora", peak=1e9)
    floor = {
        name: Reading(value=value, source="6 A/A runs")
        for name, value in (("noise_time_ratio", 0.3), ("noise_memory_ratio", 0.2))
    }
    record = read_result(path).model_copy(update={"counters": floor})
    path.unlink()
    write_result(record, path)
    head.write("lora", time=12.0, peak=1.15e9, code="n")
    report = report_of(base.root, head.root)
    times = one(report, "step_s")
    assert (times.verdict, times.bound) == ("same", 0.3)
    memory = one(report, "host_rss_bytes")
    assert (memory.verdict, memory.bound) == ("same", 0.2)


def test_time_and_memory_are_never_compared_between_devices(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora", device_key="machine A")
    head.write("lora", device_key="machine B", time=99.0, peak=9e9, code="n")
    report = report_of(base.root, head.root)
    assert report.exit_code == 0
    assert one(report, "step_s").verdict == one(report, "host_rss_bytes").verdict == "not compared"
    assert one(report, "step_s").note == "measured on 'machine B', the baseline on 'machine A'"
    assert report.compared["counter"] > 0
    required = report_of(base.root, head.root, require=("counter", "time"))
    assert (required.overall, required.exit_code) == ("requirement not met", 2)


def test_a_lost_cell_leaves_a_requirement_unmet(sides: tuple[Any, Any]) -> None:
    base, head = sides
    for method in ("lora", "fft"):
        base.write(method)
    head.write("lora", code="n")
    assert report_of(base.root, head.root).exit_code == 0
    assert report_of(base.root, head.root, require=("counter",)).exit_code == 2


# --- quality -----------------------------------------------------------------------------------------------------


def test_seeds_of_a_row_are_compared_together(sides: tuple[Any, Any]) -> None:
    for factory, skill in zip(sides, (0.3, 0.1), strict=True):
        for seed in (1, 2, 3):
            factory.write("lora", seed=seed, skill=skill, code=str(skill))
    report = report_of(sides[0].root, sides[1].root)
    found = [(cell.name, c) for cell in report.cells for c in cell.comparisons if c.metric == "recall_10"]
    ((name, comparison),) = found
    assert (name, comparison.note, comparison.verdict) == ("lora [seed=1]", "mean over seeds 1, 2, 3", "regressed")


def test_other_users_and_random_weights_are_not_paired(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    path = head.write("lora", code="n", skill=0.01)
    file = path.parent / "ranks-1.npz"
    with np.load(file) as old:
        arrays = dict(old)
    np.savez(file, **arrays | {"target": arrays["target"][::-1]})
    assert one(report_of(base.root, head.root), "ndcg_10").note == "the baseline was tested on other users or targets"
    flag = {"code": "random-weights", "message": "random"}
    edited(path, lambda raw: raw.update(flags=[flag]))
    note = one(report_of(base.root, head.root), "ndcg_10").note
    assert note is not None
    assert "random weights" in note


def test_chance_alone_seldom_condemns_one_of_many_rows(make_factory: Make, tmp_path: Path) -> None:
    """Twenty rows whose users hit by luck on both sides: Holm keeps the family at its level."""
    base, head = make_factory(tmp_path / "base"), make_factory(tmp_path / "head")
    for row in range(20):
        base.write(f"m{row}", skill=0.30)
        head.write(f"m{row}", skill=0.301 + 0.001 * row, code="n")  # another skill, other lucky users
    report = report_of(base.root, head.root, quality_threshold=0.0)
    assert not [
        c for cell in report.cells for c in cell.comparisons if c.kind == "quality" and c.verdict == "regressed"
    ]


# --- cells -------------------------------------------------------------------------------------------------------


def test_missing_and_new_cells_are_listed_with_their_nearest(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    base.write("fft")
    head.write("lora", dataset_fingerprint="cd" * 32)
    head.write("fft")
    report = report_of(base.root, head.root)
    states = {(cell.name.split()[0], cell.state) for cell in report.cells}
    assert states == {("lora", "missing"), ("lora", "new"), ("fft", "compared")}
    notes = [cell.note for cell in report.cells if cell.state != "compared"]
    assert notes == ["the nearest cell of the other side differs in dataset_fingerprint"] * 2
    assert report.exit_code == 0
    assert report_of(base.root, head.root, strict=True).overall == "baseline out of date"


def test_a_cell_that_no_longer_ends_is_a_regression(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    head.write("lora", status="oom", time=None, code="n")
    report = report_of(base.root, head.root)
    assert [c.metric for _, c in report.with_verdict("regressed")] == ["status"]
    assert report.exit_code == 1
    assert [c.metric for _, c in report_of(head.root, base.root).with_verdict("improved")] == ["status"]


@pytest.mark.parametrize(("before", "after"), [("error", "error"), ("error", "killed"), ("timeout", "timeout")])
def test_a_cell_that_failed_on_both_sides_was_not_compared(sides: tuple[Any, Any], before: str, after: str) -> None:
    """Its parameters may have been counted before it broke: that is no comparison to pass on."""
    for factory, status in zip(sides, (before, after), strict=True):
        factory.write("lora", status=status, time=None)
    report = report_of(sides[0].root, sides[1].root)
    assert (report.overall, report.exit_code) == ("nothing compared", 2)
    assert one(report, "status").note == f"it failed on both sides ({before}, {after})"
    assert verdicts(report) == {"status": "not compared"}


def test_an_end_that_says_something_is_compared(sides: tuple[Any, Any]) -> None:
    for factory in sides:
        factory.write("lora", status="oom", time=None)
    report = report_of(sides[0].root, sides[1].root)
    assert (report.overall, one(report, "trainable_parameters").verdict) == ("fine", "same")


def test_numbers_of_one_side_alone_are_told(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    path = head.write("lora", code="n")
    missing = {"value": None, "source": "VmHWM", "valid": False, "reason": "no /proc"}
    edited(path, lambda raw: raw["training_memory"].update(host_rss_bytes=missing))
    edited(path, lambda raw: raw["files"].pop("samples"))
    report = report_of(base.root, head.root)
    for name in ("step_s", "host_rss_bytes"):
        assert (one(report, name).verdict, one(report, name).note) == ("not compared", "not measured by the runs")
        assert one(report, name).base is not None
    assert one(report_of(head.root, base.root), "step_s").note == "not in the base"
    assert report_of(base.root, head.root, require=("memory",)).exit_code == 2


def test_nothing_in_common_is_not_a_pass(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    head.write("fft")
    report = report_of(base.root, head.root)
    assert (report.overall, report.exit_code) == ("nothing compared", 2)


def test_strict_asks_for_an_update_also_after_an_improvement(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    head.write("lora", millions=0.9, code="n")
    assert report_of(base.root, head.root).exit_code == 0
    report = report_of(base.root, head.root, strict=True)
    assert (report.overall, report.exit_code) == ("baseline out of date", 1)


def test_strict_misses_a_counter_that_is_not_counted_any_more(sides: tuple[Any, Any]) -> None:
    base, head = sides
    counted(base.write("lora", training={"epochs": 4}), saved_bytes=1000)
    path = head.write("lora", training={"epochs": 4}, code="n")
    assert report_of(base.root, head.root).exit_code == 0
    assert report_of(base.root, head.root, strict=True).overall == "baseline out of date"
    counted(path, saved_bytes=1000)
    edited(path, lambda raw: raw["epochs"].pop())  # validation stopped it: the number of steps is not exact
    report = report_of(base.root, head.root, strict=True)
    assert (report.overall, one(report, "steps").verdict) == ("fine", "not compared")


def test_only_the_latest_code_of_a_run_folder_counts(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    head.write("lora", time=99.0, code="old", started_at="2026-01-01T00:00:00+00:00")
    head.write("lora", code="new", started_at="2026-01-02T00:00:00+00:00")
    assert verdicts(report_of(base.root, head.root))["step_s"] == "same"
    assert load_runs([head.root]).notes == (f"1 records of older code in {head.root} were left out",)


def test_cells_of_an_earlier_matrix_of_a_run_folder_do_not_count(factory: Any) -> None:
    """A misspelt encoder that ran there once is neither in a baseline nor missing from the next run."""
    factory.write("fft", status="error", time=None, text_encoder=EncoderSpec(source="bert-bsae"))
    kept = factory.write("lora")
    (factory.root / "cells.json").write_text(json.dumps({"cells": [kept.parent.name]}))
    assert [recorded.path for recorded in read_records([factory.root])] == [kept]


def test_names_tell_cells_of_one_label_apart(sides: tuple[Any, Any]) -> None:
    base, head = sides
    for factory in sides:
        factory.write("lora", options={"rank": 4})
        factory.write("lora", options={"rank": 8})
        factory.write("fft")
    report = report_of(base.root, head.root)
    assert [cell.name for cell in report.cells] == ["fft", "lora [options.rank=4]", "lora [options.rank=8]"]


def test_the_key_of_a_cell_leaves_out_only_code_device_and_trial(factory: Any) -> None:
    cell = factory.cell("lora")
    same = cell.model_copy(update={"device": "cuda", "lr_trial": 1, "lr_trials": 3})
    assert cell_key(same) == cell_key(cell)
    for change in ({"seed": 2}, {"options": {"rank": 2}}, {"protocol": "paper"}, {"dataset_fingerprint": "0" * 64}):
        assert cell_key(cell.model_copy(update=change)) != cell_key(cell)


def test_a_further_setting_leaves_a_baseline_valid(baseline: Path) -> None:
    """As an older version wrote it, which did not know the setting yet: it ran with what is the default now."""
    text = re.sub(r', "compile": false', "", baseline.read_text())
    assert text != baseline.read_text()
    baseline.write_text(text)
    assert len(read_baseline(baseline).cells) == 2


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def baseline(factory: Any, tmp_path: Path) -> Path:
    for method in ("lora", "fft"):
        counted(factory.write(method), saved_bytes=123456)
    path = tmp_path / "baseline.json"
    write_baseline(from_records([factory.root]), path)
    return path


def test_a_baseline_says_the_same_as_the_records_it_was_made_of(baseline: Path, factory: Any) -> None:
    report = report_of(baseline, factory.root)
    assert report.exit_code == 0
    assert report.compared == report_of(factory.root, factory.root).compared
    assert {c.verdict for cell in report.cells for c in cell.comparisons} == {"same", "not compared"}


def test_a_baseline_is_small_sorted_and_has_a_line_a_number(baseline: Path) -> None:
    text = baseline.read_text()
    kept = read_baseline(baseline)
    assert [measured.cell.method for measured in kept.cells] == ["fft", "lora"]
    assert text.count('"saved_bytes": 123456') == 2
    assert '    "saved_bytes": 123456,' in text.splitlines()
    assert len(text) < 4000 * len(kept.cells)
    assert list(kept.devices) == ["cpu: test, 2 threads"]
    assert kept.packages["torch"] == "2.13.0"


def test_the_sample_of_a_long_run_is_bounded(factory: Any, tmp_path: Path) -> None:
    with_steps(factory.write("lora"), list(np.random.default_rng(0).lognormal(size=4000)))
    (measured,) = from_records([factory.root]).cells
    (device,) = measured.devices.values()
    assert len(device.timing.step_s) == SAMPLE


def test_an_update_keeps_what_was_not_measured_again(baseline: Path, make_factory: Make, tmp_path: Path) -> None:
    other = make_factory(tmp_path / "other")
    counted(other.write("lora", device_key="machine B", code="n"), saved_bytes=99)
    merged = updated(read_baseline(baseline), from_records([other.root]))
    cells = {measured.cell.method: measured for measured in merged.cells}
    assert cells["lora"].counters["saved_bytes"] == 99
    assert sorted(cells["lora"].devices) == sorted(merged.devices) == ["cpu: test, 2 threads", "machine B"]
    assert cells["fft"].counters["saved_bytes"] == 123456
    assert isinstance(Baseline.model_validate_json(merged.model_dump_json()), Baseline)


def test_repeats_that_disagree_on_a_counter_are_refused(make_factory: Make, tmp_path: Path) -> None:
    for number in (1, 2):
        counted(make_factory(tmp_path / f"run{number}").write("lora"), saved_bytes=number)
    with pytest.raises(UserError, match=r"saved_bytes is 2, in .* it is 1 for the same cell"):
        from_records([tmp_path / "run1", tmp_path / "run2"])


# --- bad input ---------------------------------------------------------------------------------------------------


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: text.replace('"tpme-baseline"', '"something"'), 'lacks "format": "tpme-baseline"'),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 7'),
            "schema version 7, this tpme reads 1",
        ),
        (lambda text: text.replace('"saved_bytes": 123456', '"saved_bytes": "many"'), "counters.saved_bytes"),
        (lambda text: text.replace('"seed": 1', '"seed": 2'), "does not fit its key"),
        (lambda text: text.replace('"ranks": "e', '"ranks": "%'), "not the ranks"),
        (lambda text: re.sub(r'"recall_10": 0\.\d', '"recall_10": 0.9', text), "does not match the ranks beside it"),
        (lambda text: re.sub(r'"step_s": \[[\d.]+', '"step_s": [0.0', text), "greater than 0"),
        (lambda text: "[]", 'lacks "format"'),
        (lambda text: "", "not JSON"),
    ],
)
def test_a_broken_baseline_is_one_clear_line(baseline: Path, change: Callable[[str], str], words: str) -> None:
    baseline.write_text(change(baseline.read_text()))
    message = refused(lambda: load_baseline(baseline))
    assert message.startswith(f"{baseline}: ")
    assert words in message
    assert "tpme baseline" in message


def test_broken_records_are_one_clear_line(factory: Any, tmp_path: Path) -> None:
    path = factory.write("lora")
    whole = path.read_text()
    path.write_text(whole[:500])
    assert "not a readable record" in refused(lambda: load_runs([factory.root]))
    path.write_text(whole.replace('"schema_version": 2', '"schema_version": 3'))
    assert "schema version 3, this tpme reads 1 to 2;" in refused(lambda: load_runs([factory.root]))
    path.write_text(whole.replace('"steps": 10', '"steps": 0', 1))
    assert "field 'epochs.0.steps'" in refused(lambda: load_runs([factory.root]))
    path.write_text(whole.replace('"wall_s"', '"wall"', 1))
    assert "the record was changed or truncated" in refused(lambda: load_runs([factory.root]))
    path.write_text(whole)
    with_steps(path, [1.0, -1.0, 1.0])
    assert "samples-1.npz: it holds times that are negative or not finite" in refused(lambda: load_runs([factory.root]))
    with np.load(path.parent / "samples-1.npz") as old:
        arrays = dict(old) | {"step_s": np.ones(7)}
    np.savez(path.parent / "samples-1.npz", **arrays)
    assert "samples-1.npz: its arrays differ in length" in refused(lambda: load_runs([factory.root]))
    (path.parent / "samples-1.npz").write_bytes(b"PK")
    assert "samples-1.npz" in refused(lambda: load_runs([factory.root]))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "an empty run" in refused(lambda: load_runs([empty]))


def test_a_baseline_of_another_protocol_is_named(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora", protocol="paper")
    head.write("lora")
    message = refused(lambda: report_of(base.root, head.root))
    assert "'paper' protocol" in message
    assert "'suite'" in message


def test_runs_that_all_broke_make_no_baseline(factory: Any) -> None:
    factory.write("lora", status="error", time=None)
    assert "they ended as error" in refused(lambda: from_records([factory.root]))


def test_the_report_survives_its_json(sides: tuple[Any, Any]) -> None:
    base, head = sides
    base.write("lora")
    head.write("lora", time=20.0, code="n")
    report = report_of(base.root, head.root)
    again = GateReport.model_validate_json(report.model_dump_json())
    assert again == report
    assert isinstance(again.cells[0], CellVerdict)
    assert json.loads(report.model_dump_json())["schema_version"] == 2
