"""The bytes that a rank sends: the formula against rings played round by round, and against what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranked import run_ranks

from tpme.bench.counting.traffic import (
    BUCKET_BYTES,
    Sharded,
    Traffic,
    all_gather,
    all_reduce,
    reduce_scatter,
    step_traffic,
    vector_bytes,
)


def ring(parts: list[set[int]], ranks: int) -> int:
    """Parts that rank 0 sends until every rank has every part, each rank passing on what it got last."""
    latest, sent = [set(part) for part in parts], 0
    while any(len(part) < ranks for part in parts):
        sent += len(latest[0])
        latest = [latest[rank - 1] for rank in range(ranks)]
        parts = [old | new for old, new in zip(parts, latest, strict=True)]
    return sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_a_ring_sends_what_the_formula_says(ranks: int) -> None:
    each = 24
    sent = ring([{rank} for rank in range(ranks)], ranks) * each
    assert all_gather(each * ranks, ranks) == sent
    assert reduce_scatter(each * ranks, ranks) == sent
    assert all_reduce(each * ranks, ranks) == 2 * sent


def test_one_device_sends_nothing() -> None:
    assert step_traffic(1, items=100, width=64, gradient_bytes=10**6, sharded=Sharded(9, 9, 9, 1)).total == 0


def test_shares_are_as_long_as_the_longest() -> None:
    assert vector_bytes(8, 16, 4) == vector_bytes(7, 16, 4) == vector_bytes(5, 16, 4) == 8 * 16 * 4
    assert vector_bytes(9, 16, 4) == 12 * 16 * 4


def test_the_parts_of_a_step() -> None:
    sharded = Sharded(forward_bytes=4000, backward_bytes=2000, gradient_bytes=1000, groups=3)
    step = step_traffic(4, items=8, width=16, gradient_bytes=2 * BUCKET_BYTES, sharded=sharded)
    vectors = 3 * 2 * 16 * 4  # to each of the three others, its two vectors of 16 floats
    buckets, gathers, scatters = 2 * 2, 1 + 3 + 3, 1 + 3
    assert step == Traffic(
        item_vectors=vectors,
        vector_gradients=vectors,
        gradients=3 * BUCKET_BYTES,
        sharded_weights=4500,
        sharded_gradients=750,
        rounds=3 * (buckets + gathers + scatters),
    )
    assert step.total == 2 * vectors + 3 * BUCKET_BYTES + 5250


def test_every_pass_gathers_its_vectors_and_gradients_are_added_up_once() -> None:
    once, twice = (step_traffic(2, items=8, width=16, gradient_bytes=400, passes=passes) for passes in (1, 2))
    assert twice.item_vectors == 2 * once.item_vectors
    assert twice.vector_gradients == 2 * once.vector_gradients
    assert twice.gradients == once.gradients == 400


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_what_is_sent_is_what_the_formula_says(world: Any, tmp_path: Path, devices: int) -> None:
    """In float64; with every gradient goes a number that says whether there is one."""
    methods = {"fft": 1, "lora": 1, "iisan": 1, "id": 1, "dyt": 2}
    cases = [{"method": method, "steps": 1} for method in methods]
    for case, found in zip(cases, run_ranks(world, tmp_path, cases, devices), strict=True):
        sent, trained, passes = found["sent"], found["trained"], methods[case["method"]]
        formula = step_traffic(
            devices,
            items=found["items"],
            width=16,
            gradient_bytes=8 * (sum(trained) + len(trained)),
            passes=passes,
            element_bytes=8,
        )
        assert sent["all-gather"] == formula.item_vectors
        assert sent["reduce-scatter"] == formula.vector_gradients
        assert sent["all-reduce"] == pytest.approx(formula.gradients, abs=8 * devices)
