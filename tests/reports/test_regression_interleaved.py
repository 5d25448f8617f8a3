"""Interleaved runs: bursts of noise must not look like changes, changes must not hide in noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tpme.bench.record import read_result
from tpme.reports.data.load import Recorded
from tpme.reports.gate.interleaved import compare_peaks, compare_times, judge_runs, suspicious, undecided
from tpme.reports.gate.measures import cell_key
from tpme.reports.gate.verdict import CellVerdict, Comparison, Policy, conclude

Floats = npt.NDArray[np.float64]
Make = Callable[..., Any]
POLICY = Policy()


def runs(rng: np.random.Generator, number: int, *, slower: float = 1.0, steps: int = 40) -> list[Floats]:
    """Step times of ``number`` runs over the same batches, some of them hit by bursts of other work."""
    batches = np.random.default_rng(9).uniform(0.8, 1.2, steps)
    found = []
    for _ in range(number):
        burst = np.ones(steps)
        start = rng.integers(steps)
        burst[start : start + rng.integers(steps)] = rng.uniform(1, 2)
        found.append(slower * batches * burst * rng.lognormal(0, 0.02, steps))
    return found


def test_bursts_of_other_work_are_no_regression() -> None:
    rng = np.random.default_rng(0)
    found = [compare_times("step_s", runs(rng, 8), runs(rng, 8), POLICY).verdict for _ in range(40)]
    assert set(found) <= {"same", "inconclusive"}
    assert found.count("same") >= 36


def test_a_slowdown_is_found_through_bursts() -> None:
    rng = np.random.default_rng(1)
    found = [compare_times("step_s", runs(rng, 8), runs(rng, 8, slower=1.2), POLICY) for _ in range(40)]
    assert {one.verdict for one in found} <= {"slower", "inconclusive"}
    assert [one.verdict for one in found].count("slower") >= 34
    first = next(one for one in found if one.verdict == "slower")
    assert first.ratio == pytest.approx(1.2, abs=0.05)
    assert first.low is not None
    assert first.high is not None
    assert 1.1 < first.low < 1.2 < first.high
    faster = compare_times("step_s", runs(rng, 8, slower=1.4), runs(rng, 8), POLICY)
    assert faster.verdict == "faster"


def test_runs_that_vary_much_are_not_the_same() -> None:
    """As on a shared machine: +61 % [-18 %, +160 %] was called the same, for the noise was larger."""
    base = [np.full(20, taken) for taken in (1.0, 1.963)]
    head = [np.full(20, taken) for taken in (1.61, 2.6)]
    compared = compare_times("step_s", base, head, POLICY)
    assert (compared.ratio, compared.low, compared.high) == pytest.approx((1.61, 0.82, 2.6), abs=0.01)
    assert compared.verdict == "inconclusive"
    assert compared.suspect
    cell = CellVerdict(key="k", name="n", dataset="d", state="compared", comparisons=(compared,))
    assert undecided(cell)
    assert conclude([cell], POLICY, command="ab", base="a", head="b", duration_s=0.0).exit_code == 2
    assert compared.advice is not None
    assert re.fullmatch(r"about \d+ more runs of each side would settle it \(--rounds \d+\)", compared.advice)
    more = compare_times("step_s", [*base, *base[:1] * 6], [*head, *head[:1] * 6], POLICY)
    assert more.verdict == "slower"


def test_a_single_run_settles_nothing() -> None:
    """Its interval shows how steps differ, not how runs do."""
    one = [np.full(20, 1.0)]
    for head in (1.0, 1.5):
        compared = compare_times("step_s", one, [np.full(20, head)], POLICY)
        assert (compared.verdict, compared.low) == ("inconclusive", head)
        assert compared.advice == "about 1 more run of each side would settle it (--rounds 1)"
    assert compare_peaks("host_rss_bytes", [100.0], [100.0], POLICY).verdict == "inconclusive"


def test_what_slows_only_few_steps_counts_by_its_share() -> None:
    """A quantile would not see that every fifth step takes twice as long; the mean over steps is 20 % higher."""
    rng = np.random.default_rng(2)
    head = runs(rng, 4)
    for taken in head:
        taken[::5] *= 2
    assert compare_times("step_s", runs(rng, 4), head, POLICY).ratio == pytest.approx(1.2, abs=0.05)


def test_epochs_of_all_runs_are_tested_together_where_one_run_has_few() -> None:
    two = [np.array([1.0, 1.01])] * 3
    assert compare_times("epoch_s", two, [taken * 1.3 for taken in two], POLICY).verdict == "not compared"
    four = [np.array([1.0, 1.01])] * 4
    assert compare_times("epoch_s", four, [taken * 1.3 for taken in four], POLICY).verdict == "slower"


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        ([110.0, 111.0], "regressed"),
        ([110.0, 100.5], "inconclusive"),
        ([104.0, 104.0], "same"),
        ([90.0, 91.0], "improved"),
        ([90.0, 100.5], "inconclusive"),  # the smallest alone proves nothing
        ([110.0, 100.5, 110.0, 111.0, 112.0, 110.5], "inconclusive"),  # nor do six runs against two
    ],
)
def test_memory_needs_runs_apart(head: Sequence[float], verdict: str) -> None:
    compared = compare_peaks("host_rss_bytes", [100.0, 101.0], head, POLICY)
    assert compared.verdict == verdict
    assert compared.low is not None
    assert compared.ratio is not None
    assert compared.low <= compared.ratio


def test_one_low_peak_of_many_hides_no_growth() -> None:
    base = [100.0, 101.0, 103.0, 102.0, 107.0, 101.5, 104.0, 100.5]
    head = [110.0, 99.0, 113.0, 112.0, 117.0, 111.5, 114.0, 110.5]
    compared = compare_peaks("host_rss_bytes", base, head, POLICY)
    assert compared.verdict == "regressed"
    assert compared.ratio == pytest.approx(111.75 / 101.75)


@pytest.mark.parametrize(
    ("peaks", "more"), [([104.5, 104.0], False), ([106.0, 102.5], True), ([90.0, 102.0], True), ([110.0, 111.0], False)]
)
def test_memory_across_its_bound_needs_more_runs(peaks: Sequence[float], more: bool) -> None:
    compared = compare_peaks("host_rss_bytes", [100.0, 100.0], peaks, POLICY)
    cell = CellVerdict(key="k", name="n", dataset="d", state="compared", comparisons=(compared,))
    assert undecided(cell) is more


@pytest.mark.parametrize(
    ("one", "again"),
    [
        (Comparison(metric="step_s", kind="time", ratio=1.06, bound=0.1, verdict="same"), True),
        (Comparison(metric="step_s", kind="time", ratio=1 / 1.06, bound=0.1, verdict="same"), True),
        (Comparison(metric="step_s", kind="time", ratio=1.04, bound=0.1, verdict="same"), False),
        (Comparison(metric="step_s", kind="time", ratio=1.0, bound=0.1, verdict="inconclusive"), True),
        (Comparison(metric="host_rss_bytes", kind="memory", ratio=1.03, bound=0.05, verdict="same"), True),
        (Comparison(metric="status", kind="status", base="ok", head="killed", verdict="regressed"), True),
        (Comparison(metric="saved_bytes", kind="counter", ratio=2.0, bound=0.0, verdict="regressed"), False),
    ],
)
def test_what_looks_changed_is_measured_again(one: Comparison, again: bool) -> None:
    cell = CellVerdict(key="k", name="n", dataset="d", state="compared", comparisons=(one,))
    assert suspicious(cell) is again


# --- whole cells -------------------------------------------------------------------------------------------------


@pytest.fixture
def sides(make_factory: Make, tmp_path: Path) -> Callable[..., dict[str, list[Recorded]]]:
    """``sides("base", [{...}, {...}])``: the runs of one cell, each written with these changes."""

    def write(side: str, changes: Sequence[dict[str, Any]]) -> dict[str, list[Recorded]]:
        found = []
        for number, change in enumerate(changes):
            path = make_factory(tmp_path / side / str(number)).write("lora", **change)
            found.append(Recorded(path, read_result(path), "cpu"))
        return {cell_key(found[0].result.cell): found}

    return write


def verdicts(cells: Sequence[CellVerdict]) -> dict[str, str]:
    (cell,) = cells
    return {one.metric: one.verdict for one in cell.comparisons}


def test_cells_are_judged_by_all_their_numbers(sides: Callable[..., Any]) -> None:
    base = sides("base", [{}, {}])
    head = sides("head", [{"millions": 2.0, "time": 13.0, "peak": 2.4e9, "code": "n"}] * 2)
    found = verdicts(judge_runs(base, head, POLICY, ("a", "b")))
    assert found["trainable_parameters"] == found["host_rss_bytes"] == "regressed"
    assert found["step_s"] == "slower"
    assert found["status"] == found["recall_10"] == "same"
    assert "epoch_s" in found


def test_a_slowdown_that_does_not_come_back_is_withdrawn(sides: Callable[..., Any]) -> None:
    base = sides("base", [{"time": 10.0}] * 4)
    head = sides("head", [{"time": 13.0}] * 4)
    (key,) = base
    assert verdicts(judge_runs(base, head, POLICY, ("a", "b"), {key: 2}))["step_s"] == "slower"
    once = sides("once", [{"time": 13.0}, {"time": 13.0}, {"time": 10.0}, {"time": 10.0}])
    assert verdicts(judge_runs(base, once, POLICY, ("a", "b"), {key: 2}))["step_s"] == "inconclusive"
    again = sides("again", [{"time": 13.0}] * 2 + [{"time": 10.0}] * 6)
    assert verdicts(judge_runs(sides("more", [{}] * 8), again, POLICY, ("a", "b"), {key: 2}))["step_s"] == "same"


def test_a_cell_that_fails_on_both_sides_is_no_pass_and_not_run_again(sides: Callable[..., Any]) -> None:
    base, head = (sides(name, [{"status": "error", "time": None}] * 2) for name in ("base", "head"))
    found = judge_runs(base, head, POLICY, ("a", "b"))
    assert verdicts(found) == {"status": "not compared"}
    assert not suspicious(found[0])


def test_what_only_one_side_could_measure_is_told(sides: Callable[..., Any]) -> None:
    base, head = sides("base", [{}, {}]), sides("head", [{"peak": None}, {"peak": None}])
    (cell,) = judge_runs(base, head, POLICY, ("a", "b"))
    (peak,) = (one for one in cell.comparisons if one.metric == "host_rss_bytes")
    assert (peak.verdict, peak.note) == ("not compared", "not measured by the runs")


def test_one_lost_run_of_many_is_no_end(sides: Callable[..., Any]) -> None:
    base = sides("base", [{}] * 3)
    lost = {"status": "killed", "time": None}
    assert verdicts(judge_runs(base, sides("a", [{}, lost, {}]), POLICY, ("a", "b")))["status"] == "same"
    assert verdicts(judge_runs(base, sides("b", [{}, lost, lost]), POLICY, ("a", "b")))["status"] == "regressed"
