"""Ranking the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpme.bench.counting.modes import Tracker
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.ranking import SCORE_BYTES, rank_targets

PRINTED_S, PRINTED_COUNTING_S = 1.30e-3, 0.06e-3
"""A user of Scientific, two cores: the reference's evaluation, and counting ranks."""
DIM = 64


def task(data: Dataset) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    test = data.test
    return (
        torch.randn(len(test.target), DIM, generator=generator),
        torch.randn(data.manifest.items + 1, DIM, generator=generator),
        torch.from_numpy(test.target.astype(np.int64)),
        torch.from_numpy(test.history.astype(np.int64)),
    )


def test_ranking_without_a_sort_a_user(
    scientific: Dataset, looped: ModuleType, compare: Any, printed: Any, device: torch.device
) -> None:
    given = [tensor.to(device) for tensor in task(scientific)]
    users = len(given[0])
    few = [given[0][:100], given[1], given[2][:100], given[3][:100]]
    found = compare(
        f"ranking, {users:,} users x {scientific.manifest.items:,} items",
        lambda: looped.ranks(*given),
        lambda: rank_targets(*given),
        20,
        rounds=1,
        printed=printed(users * PRINTED_S, lambda: looped.counted_ranks(*few), len(few[0]) * PRINTED_COUNTING_S),
    )
    reachable = ~(given[3] == given[2][:, None]).any(dim=1).cpu().numpy()
    sorted_ranks, ours = found.first[0][reachable], found.first[1].cpu().numpy()[reachable]
    # A product of one user and of many add in another order: two scores that are all but equal may change places.
    assert np.abs(sorted_ranks - ours).max() <= 2
    assert (sorted_ranks != ours).mean() < 0.02
    assert np.array_equal(sorted_ranks <= 10, ours <= 10)


def test_the_tie_rule_costs_little(scientific: Dataset, looped: ModuleType, compare: Any, device: torch.device) -> None:
    given = [tensor.to(device) for tensor in task(scientific)]
    found = compare(
        "ranking with exact ties, against float32 scores alone",
        lambda: looped.float32_ranks(*given),
        lambda: rank_targets(*given),
        1 / 1.3,
        rounds=3,
    )
    reachable = ~(given[3] == given[2][:, None]).any(dim=1)
    assert (found.first[0][reachable] != found.first[1][reachable]).float().mean() < 0.02


def test_a_million_items_in_bounded_memory(benchmark: Any, say: Callable[[str], None], note: Any) -> None:
    users, items = 256, 1_000_000
    target, history = torch.randint(1, items + 1, (users,)), torch.randint(0, items + 1, (users, 12))
    given = torch.randn(users, DIM), torch.randn(items + 1, DIM), target, history
    with Tracker(given) as tracker:
        held = tracker.peak_bytes
        rank_targets(*given)
    more = tracker.peak_bytes - held
    benchmark.pedantic(rank_targets, given, rounds=1)
    told = f"{more / 2**20:.0f} MiB"
    say(f"1,000,000 items, {users} users: {benchmark.stats['min']:.2f} s, {told} more at the peak")
    copy = given[1].nbytes
    bound = f"a chunk and a copy of the items: {(SCORE_BYTES + copy) / 2**20:.0f} MiB"
    note(f"memory of ranking {users} users x 1,000,000 items", bound, told)
    assert more <= 1.05 * SCORE_BYTES + copy
