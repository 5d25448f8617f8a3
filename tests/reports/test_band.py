"""The band of what counts as equal: where an interval lies decides, and an open number says what would settle it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tpme.bench.quantities import Kind
from tpme.reports.data.stats import median_ratio_interval, paired_ratio_interval
from tpme.reports.gate.band import settled_by_runs, settled_by_values, times_as_many, verdict_of
from tpme.reports.gate.verdict import Comparison


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ("time", 0.82, 2.60, "inconclusive"),  # +61 % [-18 %, +160 %] was called the same
        ("time", 0.97, 1.05, "same"),
        ("time", 0.97, 1.12, "inconclusive"),
        ("time", 1.05, 1.30, "inconclusive"),  # it has grown, perhaps by less than counts
        ("time", 1.11, 1.30, "slower"),
        ("time", 0.70, 0.90, "faster"),
        ("memory", 1.11, 1.30, "regressed"),
        ("memory", 0.70, 0.90, "improved"),
        ("quality", 1.11, 1.30, "improved"),
        ("quality", 0.70, 0.90, "regressed"),
    ],
)
def test_the_interval_decides(kind: Kind, low: float, high: float, verdict: str) -> None:
    assert verdict_of(kind, low, high, 0.1) == verdict
    unproven = verdict_of(kind, low, high, 0.1, proven=False)
    assert unproven == ("same" if verdict == "same" else "inconclusive"), "a change also needs its test"


@pytest.mark.parametrize(("ratio", "half"), [(1.61, 0.6), (1.0, 0.3), (1.05, 0.2), (0.7, 0.5), (1.2, 0.1)])
def test_as_many_values_as_proposed_would_settle_it(ratio: float, half: float) -> None:
    """The width of the interval shrinks with the square root of the number of values."""

    def verdict(times: float) -> str:
        width = half / math.sqrt(times)
        return verdict_of("time", ratio * math.exp(-width), ratio * math.exp(width), 0.1)

    needed = times_as_many(ratio, ratio * math.exp(-half), ratio * math.exp(half), 0.1)
    assert verdict(1) == verdict(0.95 * needed) == "inconclusive"
    assert verdict(1.05 * needed) != "inconclusive"


def inconclusive(ratio: float, low: float, high: float, bound: float = 0.1) -> Comparison:
    return Comparison(
        metric="step_s", kind="time", ratio=ratio, low=low, high=high, bound=bound, verdict="inconclusive"
    )


def test_what_would_settle_it_is_a_number_of_runs() -> None:
    noisy = inconclusive(1.61, 0.82, 2.60)
    assert noisy.suspect
    assert not inconclusive(1.05, 0.9, 1.2).suspect
    assert settled_by_runs(noisy, 8, 4) == "about 18 more runs of each side would settle it (--rounds 7)"
    assert settled_by_runs(inconclusive(1.3, 1.1, 1.5), 4, 4) == (
        "about 1 more run of each side would settle it (--rounds 2)"
    )
    assert settled_by_values(noisy, "steps", "x") == "about 4 times as many steps would settle it"


def test_no_number_of_runs_settles_a_machine_too_noisy_or_a_change_at_the_bound() -> None:
    noisy = settled_by_runs(inconclusive(1.03, 0.4, 2.6), 8, 4)
    assert noisy == (
        "not even 64 runs of each side would settle it, they vary too much for a bound of 10%: use an idle machine"
    )
    close = settled_by_runs(inconclusive(1.1, 1.09, 1.11), 8, 4)
    assert close == (
        "not even 64 runs of each side would settle it: the change is nearly the bound of 10%; choose another bound"
    )
    assert settled_by_values(inconclusive(1.03, 0.4, 2.6), "users", "add seeds").endswith("bound of 10%: add seeds")


@pytest.mark.parametrize("values", [40, 400])
def test_intervals_hold_the_true_ratio_as_often_as_they_claim(values: int) -> None:
    rng = np.random.default_rng(values)
    held = {"median": 0, "paired": 0}
    for _ in range(400):
        old, new = rng.lognormal(0, 0.5, (2, values))
        low, high = median_ratio_interval(old, 1.2 * new)
        held["median"] += low <= 1.2 <= high
        found = paired_ratio_interval(old, 1.2 * old * rng.lognormal(0, 0.2, values))
        assert found is not None
        held["paired"] += found[0] <= 1.2 * math.exp(0.02) <= found[1]
    assert min(held.values()) >= 0.91 * 400


def test_a_user_who_is_served_alike_leaves_no_doubt() -> None:
    gains = np.array([0.0, 1.0, 0.5, 0.0])
    assert paired_ratio_interval(gains, gains) == (1.0, 1.0)
    assert paired_ratio_interval(np.zeros(4), gains) is None
