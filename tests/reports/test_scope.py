"""The first line of a check: what was compared, what was not and why, and what to change."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tpme.bench.commands.baseline import baseline
from tpme.bench.quantities import Kind
from tpme.reports.gate.baseline import Baseline, Noise, from_records, load_baseline, load_runs, write_baseline
from tpme.reports.gate.check import judge
from tpme.reports.gate.formats import headline, markdown, show
from tpme.reports.gate.scope import scope
from tpme.reports.gate.verdict import GateReport, Policy, conclude


def report_of(base: Path, head: Path, *require: Kind) -> GateReport:
    policy = Policy(require=require)
    cells = judge(load_baseline(base), load_runs([head]), policy)
    return conclude(cells, policy, command="check", base=str(base), head=str(head), duration_s=0.0)


@pytest.fixture
def sides(make_factory: Callable[..., Any], tmp_path: Path) -> tuple[Any, Any]:
    """Two runs of the same matrix: factories of the base and of the head."""
    return make_factory(tmp_path / "base"), make_factory(tmp_path / "head")


@pytest.fixture
def noisy(sides: tuple[Any, Any], tmp_path: Path) -> Callable[[float], Path]:
    """``noisy(4.49)``: a baseline of one cell whose times vary by 449 %; the head's run is 30 % slower."""

    def write(noise: float) -> Path:
        base, head = sides
        base.write("lora")
        head.write("lora", time=13.0, code="n")
        baseline = from_records([base.root])
        devices = {
            name: device.model_copy(update={"noise": Noise(time=noise, pairs=3, source="3 runs of 1 cell")})
            for name, device in baseline.devices.items()
        }
        write_baseline(Baseline.model_validate(baseline.model_dump() | {"devices": devices}), tmp_path / "base.json")
        return tmp_path / "base.json"

    return write


def test_noise_that_hides_every_regression_is_not_no_regression(noisy: Any, sides: tuple[Any, Any]) -> None:
    """It said "no regression" of a step 30 % slower, for the noise of the baseline was 449 %."""
    base, head = noisy(4.49), sides[1].root
    report = report_of(base, head)
    assert scope(report) == (
        "Compared: counters, memory and quality of 1 cell. "
        "Not compared: time of 1 cell (the baseline's noise of 449% hides anything smaller). "
        "To compare time: repeat the runs of the baseline on an idle machine, three times or more, or use 'tpme ab'."
    )
    assert (report.overall, report.exit_code) == ("fine", 0)
    assert "no regression in counters, memory and quality; not compared: time (" in headline(report)
    assert markdown(report).startswith("### ⚠️ tpme check: no regression in counters")
    required = report_of(base, head, "time")
    assert (required.overall, required.exit_code) == ("requirement not met", 2)
    assert required.notes == ("required, but not settled for every cell that has it: time",)


def test_a_change_larger_than_any_noise_is_told(noisy: Any, sides: tuple[Any, Any]) -> None:
    base = noisy(4.49)
    sides[1].write("lora", time=99.0, code="later", started_at="2026-02-01T00:00:00+00:00")
    assert report_of(base, sides[1].root).exit_code == 1


def test_noise_of_usual_size_is_said_beside_what_was_compared(noisy: Any, sides: tuple[Any, Any]) -> None:
    report = report_of(noisy(0.37), sides[1].root, "time")
    assert scope(report).startswith(
        "Compared: counters, time (only changes above its noise of 37%), memory and quality"
    )
    assert report.exit_code == 0


def test_another_device_is_named_with_what_to_do(sides: tuple[Any, Any]) -> None:
    base, head = sides
    for method in ("lora", "fft"):
        base.write(method, device_key="machine A")
        head.write(method, device_key="machine B", time=99.0, code="n")
    report = report_of(base.root, head.root)
    console = Console(file=io.StringIO(), width=80)
    show(report, console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[0] == scope(report)
    note = "measured on 'machine B', the baseline on 'machine A'"
    assert scope(report) == (
        "Compared: counters and quality of 2 cells. "
        f"Not compared: time and memory of 2 cells ({note}). "
        "To compare time and memory: measure the baseline on this device "
        "('tpme baseline RUNS --out FILE --update'), or use 'tpme ab'."
    )
    assert report_of(base.root, head.root, "quality").exit_code == 0
    assert report_of(base.root, head.root, "memory").exit_code == 2


def test_one_cell_of_many_without_times_does_not_meet_the_requirement(sides: tuple[Any, Any]) -> None:
    def without_steps(path: Path) -> None:
        raw = json.loads(path.read_text()) | {"epochs": []}
        raw["files"].pop("samples")
        path.write_text(json.dumps(raw))

    for factory in sides:
        factory.write("lora")
        without_steps(factory.write("popularity"))  # it trains nothing, so there is nothing to compare
    assert report_of(sides[0].root, sides[1].root, "time").exit_code == 0
    sides[0].write("fft")
    without_steps(sides[1].write("fft"))
    report = report_of(sides[0].root, sides[1].root, "time")
    assert "Compared: counters, memory and quality of 3 cells; time of 1 cell." in scope(report)
    assert report.exit_code == 2


def test_a_counted_baseline_is_told_from_a_measured_one(sides: tuple[Any, Any], tmp_path: Path) -> None:
    base, head = sides
    base.write("lora")
    head.write("lora")
    counted = from_records([base.root])
    cells = [cell.model_copy(update={"devices": {}, "quality": None}) for cell in counted.cells]
    write_baseline(counted.model_copy(update={"cells": tuple(cells), "devices": {}}), tmp_path / "counted.json")
    first = scope(report_of(tmp_path / "counted.json", head.root))
    assert "time and memory of 1 cell (the baseline was counted, not measured)" in first
    assert "quality of 1 cell (no ranks in the baseline)" in first
    alone = scope(report_of(tmp_path / "counted.json", tmp_path / "counted.json"))
    assert alone == "Compared: counters of 1 cell. Not compared: time, memory and quality (on neither side)."


def test_quality_that_cannot_be_told_from_luck_is_not_the_same(sides: tuple[Any, Any]) -> None:
    """Recall a fifth lower with three hundred users: the test cannot reject, and nobody may call it the same."""
    base, head = sides
    base.write("lora", skill=0.10)
    head.write("lora", skill=0.08, code="n")
    report = report_of(base.root, head.root)
    (item,) = [one for one in report.cells[0].comparisons if one.metric == "recall_10"]
    assert item.ratio is not None
    assert item.ratio < 0.95
    assert (item.verdict, item.suspect) == ("inconclusive", True)
    assert (report.overall, report.exit_code) == ("inconclusive", 2)
    assert item.advice is not None
    assert "users would settle it" in item.advice


def test_a_baseline_says_what_its_noise_hides(
    make_factory: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, time in enumerate((10.0, 10.1, 10.2)):
        make_factory(tmp_path / "calm" / str(number)).write("lora", time=time)
        make_factory(tmp_path / "busy" / str(number)).write("lora", time=10.0 + 10 * number)
    baseline(tmp_path / "calm.json", [tmp_path / "calm"])
    assert "'tpme check' sees changes of time above 10%" in capsys.readouterr().out
    baseline(tmp_path / "busy.json", [tmp_path / "busy"])
    assert "too much for 'tpme check' to compare times: repeat the runs of the baseline" in capsys.readouterr().out
