from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpme.bench.task import ranking
from tpme.bench.task.ranking import NonFiniteScoreError, rank_targets, users_per_chunk


def brute_force(users: Tensor, items: Tensor, target: Tensor, history: Tensor) -> list[int]:
    """One user after the other, one candidate after the other."""
    ranks = []
    for u, wanted, earlier in zip(users, target.tolist(), history.tolist(), strict=True):
        scores = {item: float(u @ items[item]) for item in range(1, len(items))}
        others = [item for item in scores if item != wanted and item not in earlier]
        found = wanted not in earlier
        ranks.append(1 + sum(scores[o] >= scores[wanted] for o in others) if found else len(items) - 1)
    return ranks


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole-number vectors, so that scores are exact and ties are many; histories repeat, pad and hit the target."""
    users, items, width, earlier = (draw(st.integers(1, high)) for high in (6, 9, 3, 5))
    numbers = st.integers(-2, 2)

    def table(rows: int) -> Tensor:
        return torch.tensor([draw(st.lists(numbers, min_size=width, max_size=width)) for _ in range(rows)]).float()

    target = torch.tensor(draw(st.lists(st.integers(1, items), min_size=users, max_size=users)))
    history = torch.tensor(
        [draw(st.lists(st.integers(0, items), min_size=earlier, max_size=earlier)) for _ in range(users)]
    )
    return table(users), table(items + 1), target, history


@settings(max_examples=150, deadline=None)
@given(tasks(), st.sampled_from([1, 40, 100, 10**6]))
def test_equals_brute_force_in_chunks_of_any_size(
    task: tuple[Tensor, Tensor, Tensor, Tensor], score_bytes: int
) -> None:
    ranks = rank_targets(*task, score_bytes=score_bytes)
    assert ranks.dtype == torch.int32
    assert ranks.tolist() == brute_force(*task)


@pytest.mark.parametrize("width", [1, 8, 64, 100])
@pytest.mark.parametrize("users", [1, 2, 7])
def test_a_constant_scorer_ranks_every_target_last(users: int, width: int) -> None:
    """Also where scores are not exact: no rounding may put a target above items that are the same."""
    torch.manual_seed(width)
    for items in (17, 80, 4097):
        same = torch.randn(width).expand(items + 1, width).contiguous()
        target = torch.randint(1, items + 1, (users,))
        ranks = rank_targets(torch.randn(users, width), same, target, torch.zeros(users, 3, dtype=torch.int64))
        assert ranks.tolist() == [items] * users


def test_a_tie_counts_against_the_model() -> None:
    items = torch.tensor([[9.0], [1.0], [2.0], [2.0], [3.0]])
    rank = rank_targets(torch.ones(1, 1), items, torch.tensor([2]), torch.zeros(1, 1, dtype=torch.int64))
    assert rank.tolist() == [3]


def test_padding_is_no_candidate() -> None:
    items = torch.tensor([[float("inf")], [1.0], [2.0]])
    ranks = rank_targets(torch.ones(2, 1), items, torch.tensor([2, 1]), torch.zeros(2, 2, dtype=torch.int64))
    assert ranks.tolist() == [1, 2]


def test_repeats_in_the_history_are_taken_out_once() -> None:
    items = torch.tensor([[0.0], [5.0], [4.0], [3.0], [2.0]])
    rank = rank_targets(torch.ones(1, 1), items, torch.tensor([4]), torch.tensor([[1, 1, 1, 3, 0, 0]]))
    assert rank.tolist() == [2]


def test_a_target_in_the_history_gets_the_last_rank() -> None:
    items = torch.tensor([[0.0], [5.0], [4.0], [3.0]])
    rank = rank_targets(torch.ones(1, 1), items, torch.tensor([1]), torch.tensor([[0, 1, 2]]))
    assert rank.tolist() == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("score_bytes", [1, 10**6])
def test_a_score_that_is_not_finite_names_its_user(value: float, score_bytes: int) -> None:
    users = torch.ones(5, 2)
    users[3, 0] = users[4, 0] = value
    target, history = torch.ones(5, dtype=torch.int64), torch.zeros(5, 1, dtype=torch.int64)
    with pytest.raises(NonFiniteScoreError, match="user 3"):
        rank_targets(users, torch.ones(4, 2), target, history, score_bytes)


def test_a_bad_item_is_an_error_for_the_first_user() -> None:
    items = torch.ones(4, 2)
    items[2, 1] = float("nan")
    target, history = torch.ones(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(NonFiniteScoreError, match="user 0"):
        rank_targets(torch.ones(2, 2), items, target, history)


def test_scores_whose_sum_overflows_are_no_error() -> None:
    items = torch.full((40, 1), 3e37)
    items[7] = 1.0
    rank = rank_targets(torch.ones(1, 1), items, torch.tensor([7]), torch.zeros(1, 1, dtype=torch.int64))
    assert rank.tolist() == [39]


def test_no_users() -> None:
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert rank_targets(torch.zeros(0, 2), torch.ones(5, 2), none[:, 0], none).tolist() == []


@given(st.integers(1, 10**7), st.integers(1, 2**32))
def test_a_chunk_keeps_to_its_bytes(items: int, score_bytes: int) -> None:
    users = users_per_chunk(items, score_bytes)
    assert users >= 1
    assert users == 1 or 4 * items * users <= score_bytes < 4 * items * (users + 1)


def test_a_million_items_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    score = ranking._scores

    def watched(users: Tensor, candidates: Tensor) -> Tensor:
        seen.append(4 * len(users) * len(candidates))
        return score(users, candidates)

    monkeypatch.setattr(ranking, "_scores", watched)
    generator = torch.Generator().manual_seed(0)
    items, users = 1_000_000, 5
    vectors = torch.randn(items + 1, 8, generator=generator)
    user_vectors = torch.randn(users, 8, generator=generator)
    target = torch.randint(1, items + 1, (users,), generator=generator)
    history = torch.randint(0, items + 1, (users, 10), generator=generator)
    ranks = rank_targets(user_vectors, vectors, target, history, score_bytes=2 * 4 * items)
    assert seen == [8_000_000, 8_000_000, 4_000_000]
    scores = (user_vectors.double() @ vectors[1:].double().T).numpy()
    own = np.take_along_axis(scores, target[:, None].numpy() - 1, axis=1)
    # Float32 may order near-equal scores differently than float64: a few places in a million.
    assert np.abs(ranks.numpy() - (scores >= own).sum(axis=1)).max() <= 20
