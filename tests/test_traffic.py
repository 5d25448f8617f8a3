"""Bytes that a rank sends in a step: the formula, against what its collectives count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranked import run_ranks

from tpme.bench.counting.traffic import step_traffic


def test_the_formula_by_hand() -> None:
    """Two ranks, 10 items of 8 numbers: each sends 5 x 8 x 4 bytes of vectors; and the gradients once."""
    found = step_traffic(10, 8, 100, 2)
    assert (found.gather, found.scatter, found.gradients, found.total) == (160, 160, 400, 720)
    assert step_traffic(10, 8, 100, 4).gather == 3 * 3 * 8 * 4
    assert step_traffic(10, 8, 0, 2, sharded=100, sharded_trained=50).shards == 500


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_what_is_sent_is_what_the_formula_says(world: Any, tmp_path: Path, devices: int) -> None:
    methods = {"fft": 1, "lora": 1, "iisan": 1, "id": 1, "dyt": 2}
    cases = [{"method": method, "steps": 1} for method in methods]
    for case, found in zip(cases, run_ranks(world, tmp_path, cases, devices), strict=True):
        sent, trained = found["sent"], found["trained"]
        passes = methods[case["method"]]
        formula = step_traffic(
            found["items"], 16, sum(trained), devices, tensors=len(trained), passes=passes, vector_bytes=8,
            parameter_bytes=8,
        )  # fmt: skip
        assert sent["all-gather"] == formula.gather
        assert sent["reduce-scatter"] == formula.scatter
        assert sent["all-reduce"] == pytest.approx(formula.gradients, abs=8 * devices)
