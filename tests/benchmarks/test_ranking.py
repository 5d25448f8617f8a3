"""Ranking the whole catalogue."""

from __future__ import annotations

import resource
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpme.bench.task.dataset import Dataset
from tpme.bench.task.ranking import SCORE_BYTES, rank_targets

PRINTED_S, PRINTED_COUNTING_S = 1.30e-3, 0.06e-3
"""A user of Scientific, two cores: the reference's evaluation, and counting ranks."""
USERS, DIM = 1000, 64


def task(data: Dataset, users: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    test = data.test
    return (
        torch.randn(users, DIM, generator=generator),
        torch.randn(data.manifest.items + 1, DIM, generator=generator),
        torch.from_numpy(test.target[:users].astype(np.int64)),
        torch.from_numpy(test.history[:users].astype(np.int64)),
    )


def test_ranking_without_a_sort_a_user(
    scientific: Dataset, looped: ModuleType, compare: Any, against_print: Any
) -> None:
    given = task(scientific, USERS)
    found = compare(f"ranking {USERS} of 12,076 users", lambda: looped.ranks(*given), lambda: rank_targets(*given), 2)

    reachable = ~(given[3] == given[2][:, None]).any(dim=1).numpy()
    sorted_ranks, ours = looped.ranks(*given)[reachable], rank_targets(*given).numpy()[reachable]
    # A product of one user and of many add in another order: two scores that are all but equal may change places.
    assert np.abs(sorted_ranks - ours).max() <= 1
    assert (sorted_ranks != ours).mean() < 0.02
    assert np.array_equal(sorted_ranks <= 10, ours <= 10)

    few = [given[0][:100], given[1], given[2][:100], given[3][:100]]
    against_print(found.slow_s / USERS, PRINTED_S, lambda: looped.counted_ranks(*few), 100 * PRINTED_COUNTING_S)
    assert found.ratio >= 20


def test_a_million_items_in_bounded_memory(benchmark: Any, say: Callable[[str], None]) -> None:
    users, items = 256, 1_000_000
    vectors, catalogue = torch.randn(users, DIM), torch.randn(items + 1, DIM)
    target, history = torch.randint(1, items + 1, (users,)), torch.randint(0, items + 1, (users, 12))
    before = _peak_bytes()
    benchmark.pedantic(rank_targets, (vectors, catalogue, target, history), rounds=1)
    more = _peak_bytes() - before
    say(f"1,000,000 items, {users} users: {benchmark.stats['min']:.2f} s, {more / 2**20:.0f} MiB more at the peak")
    # The scores of one chunk, and a second block of that size while one chunk gives way to the next.
    assert more <= 2.5 * SCORE_BYTES


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
