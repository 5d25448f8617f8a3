from __future__ import annotations

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
        result = wanted not in earlier
        ranks.append(1 + sum(scores[o] >= scores[wanted] for o in others) if result else len(items) - 1)
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


def float64_ranks(users: Tensor, items: Tensor, target: Tensor, history: Tensor) -> list[int]:
    """Each user's scores relative to the target's, ``u . (v_item - v_target)``, in float64."""
    vectors, ranks = items[1:].double(), []
    for u, wanted, earlier in zip(users.double(), target - 1, history, strict=True):
        at_least = ((vectors - vectors[wanted]) * u).sum(dim=1) >= 0
        at_least[earlier[earlier > 0] - 1] = False
        at_least[wanted] = True
        ranks.append(int(at_least.sum()) if wanted + 1 not in earlier else len(vectors))
    return ranks


def random_task(users: int, items: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random vectors and targets; every tenth item has the vector of another."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(items + 1, width, generator=generator)
    some = torch.randint(1, items + 1, (2, max(1, items // 10)), generator=generator)
    vectors[some[0]] = vectors[some[1]]
    return (
        torch.randn(users, width, generator=generator),
        vectors,
        torch.randint(1, items + 1, (users,), generator=generator),
        torch.randint(0, items + 1, (users, 4), generator=generator),
    )


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [5, 17, 33, 80, 1001, 4097, 20_314]


def on(device: str, task: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    return [part.to(device) for part in task]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("items", SIZES)
@pytest.mark.parametrize("width", [1, 8, 64, 100])
def test_a_constant_scorer_ranks_every_target_last(items: int, width: int, device: str) -> None:
    """Also where scores are not exact: no rounding may put a target above items that are the same."""
    generator = torch.Generator().manual_seed(width)
    same = torch.randn(width, generator=generator).expand(items + 1, width).contiguous()
    for users in range(1, 8):
        target = torch.randint(1, items + 1, (users,), generator=generator)
        vectors = torch.randn(users, width, generator=generator)
        task = on(device, (vectors, same, target, torch.zeros(users, 3, dtype=torch.int64)))
        assert rank_targets(*task).tolist() == [items] * users


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alike", [0.0, 10.0, 1e4, 1e8])
@pytest.mark.parametrize("items", SIZES)
def test_ranks_equal_those_of_float64_scores(items: int, alike: float, device: str) -> None:
    """With a few equal items, with few and with many users, and where all items are alike up to their last digits."""
    for users, width in ((1, 64), (2, 8), (7, 100), (40, 64)):
        task = random_task(users, items, width, seed=users)
        task[1].add_(alike)
        result = rank_targets(*on(device, task))
        assert result.tolist() == float64_ranks(*task)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from(SIZES[:-1]),
    st.sampled_from([1, 2, 3, 31, 64, 65]),
    st.integers(0, 2**32),
    st.sampled_from([1, 10**5, 2**27]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_ranks_equal_those_of_float64_scores_in_every_precision(
    users: int, items: int, width: int, seed: int, score_bytes: int, dtype: torch.dtype
) -> None:
    """Also of vectors in half precision, of which many tie, and in chunks of any size."""
    vectors, catalogue, target, history = random_task(users, items, width, seed)
    task = vectors.to(dtype), catalogue.to(dtype), target, history
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranks = rank_targets(*task, score_bytes=score_bytes)
    assert ranks.tolist() == float64_ranks(*task)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_of_low_precision_are_not_used_and_stay_allowed(precision: str, device: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        task = random_task(40, 4097, 64, seed=0)
        assert rank_targets(*on(device, task)).tolist() == float64_ranks(*task)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_do_not_depend_on_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores moved anywhere within the rounding bound of a product leave every rank as it is."""
    task = random_task(60, 4097, 64, seed=0)
    expected = float64_ranks(*task)
    score, moved = ranking._scores, 0

    def other_kernel(users: Tensor, candidates: Tensor, buffer: Tensor) -> Tensor:
        nonlocal moved
        scores = score(users, candidates, buffer)
        bound = users.shape[1] * 2.0**-24 * users.norm(dim=1)[:, None] * candidates.norm(dim=1)
        before = scores.clone()
        scores.add_(bound * torch.empty_like(scores).uniform_(-1, 1))
        moved += int((scores != before).sum())
        return scores

    monkeypatch.setattr(ranking, "_scores", other_kernel)
    for _ in range(5):
        assert rank_targets(*on(device, task)).tolist() == expected
    assert moved > 10_000


@pytest.mark.parametrize("zero", ["users", "items", "both"])
def test_vectors_of_zeros_tie_with_everything(zero: str) -> None:
    users, items, target, _ = random_task(3, 80, 8, seed=0)
    if zero != "items":
        users.zero_()
    if zero != "users":
        items.zero_()
    assert rank_targets(users, items, target, torch.zeros(3, 1, dtype=torch.int64)).tolist() == [80] * 3


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-60, 2.0**60, 2.0**100])
def test_ranks_do_not_depend_on_the_scale_of_vectors(scale: float) -> None:
    users, items, target, history = random_task(5, 80, 8, seed=0)
    expected = float64_ranks(users, items, target, history)
    assert rank_targets(users * scale, items, target, history).tolist() == expected
    assert rank_targets(users, items * max(scale, 2.0**-100), target, history).tolist() == expected


def test_halves_are_summed_in_the_same_order_on_every_machine() -> None:
    """1 - 2^-54 rounds to 1, so signs tell the order of a sum: (a + c) + (b + d), never from left to right."""
    tiny = 2.0**-54
    items = torch.tensor([[1.0, -tiny, -1.0, 0.0], [1.0, -1.0, -tiny, 0.0]], dtype=torch.float64)
    none = torch.zeros(2, 4)
    assert ranking._not_below(torch.ones(2, 4), items, none).tolist() == [False, True]


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

    def watched(users: Tensor, candidates: Tensor, buffer: Tensor) -> Tensor:
        seen.append(4 * len(users) * len(candidates))
        return score(users, candidates, buffer)

    monkeypatch.setattr(ranking, "_scores", watched)
    generator = torch.Generator().manual_seed(0)
    items, users = 1_000_000, 5
    vectors = torch.randn(items + 1, 8, generator=generator)
    user_vectors = torch.randn(users, 8, generator=generator)
    target = torch.randint(1, items + 1, (users,), generator=generator)
    history = torch.randint(0, items + 1, (users, 10), generator=generator)
    ranks = rank_targets(user_vectors, vectors, target, history, score_bytes=2 * 4 * items)
    assert seen == [8_000_000, 8_000_000, 4_000_000]
    assert ranks.tolist() == float64_ranks(user_vectors, vectors, target, history)
