from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_normalized_dcg

from tpme.bench.errors import UserError
from tpme.bench.side_files import UserRanks
from tpme.reports.data.metrics import bootstrap_means, quality
from tpme.reports.data.user_ranks import gains

ITEMS = 30
users = st.lists(st.tuples(st.integers(1, ITEMS), st.booleans(), st.booleans()), min_size=1, max_size=25)


def ranks_of_seeds(n: int) -> st.SearchStrategy[list[list[int]]]:
    """Ranks of ``n`` users under one to four seeds."""
    return st.lists(st.lists(st.integers(1, ITEMS), min_size=n, max_size=n), min_size=1, max_size=4)


def make(rows: list[tuple[int, bool, bool]]) -> UserRanks:
    rank, cold, seen = (np.array(column) for column in zip(*rows, strict=True))
    return UserRanks(rank=rank.astype(np.int32), target=np.arange(len(rows)), cold=cold, in_history=seen)


@given(users, st.integers(1, ITEMS))
def test_gains_equal_a_loop(rows, k):
    ranks = make(rows)
    hits = [1.0 if rank <= k and not seen else 0.0 for rank, _, seen in rows]
    assert gains(ranks, "recall", k).tolist() == hits
    loop = [hit / math.log2(1 + rank) for hit, (rank, _, _) in zip(hits, rows, strict=True)]
    assert gains(ranks, "ndcg", k) == pytest.approx(loop, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(users, st.sampled_from([1, 5, 10, 20]))
def test_gains_equal_torchmetrics(rows, k):
    rows = [(rank, cold, False) for rank, cold, _ in rows]
    ranks = make(rows)
    for user, (rank, _, _) in enumerate(rows):
        scores = torch.linspace(1, 0, ITEMS)
        target = torch.zeros(ITEMS, dtype=torch.long)
        target[rank - 1] = 1  # the item on place ``rank``
        assert gains(ranks, "recall", k)[user] == pytest.approx(retrieval_hit_rate(scores, target, top_k=k).item())
        ndcg = retrieval_normalized_dcg(scores, target, top_k=k).item()
        assert gains(ranks, "ndcg", k)[user] == pytest.approx(ndcg, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20).flatmap(ranks_of_seeds))
def test_quality_is_the_mean_over_users_and_seeds(seeds):
    n = len(seeds[0])
    cold = np.arange(n) % 3 == 0
    ranks = [UserRanks(np.array(one), np.arange(n), cold, np.zeros(n, bool)) for one in seeds]
    line = quality({"x": ranks}, resamples=50).loc["x"]
    recalls = [np.mean([rank <= 5 for rank in one]) for one in seeds]
    assert line["recall_5"] == pytest.approx(np.mean(recalls))
    assert line["users_cold"] == cold.sum()
    colds = [np.mean([rank <= 10 for rank, is_cold in zip(one, cold, strict=True) if is_cold]) for one in seeds]
    assert line["recall_10_cold"] == pytest.approx(np.mean(colds))
    if len(seeds) > 1:
        assert line["recall_5_sd"] == pytest.approx(np.std(recalls, ddof=1))
    else:
        assert np.isnan(line["recall_5_sd"])
    assert line["recall_5_low"] <= line["recall_5"] + 1e-12
    assert line["recall_5_high"] >= line["recall_5"] - 1e-12


def test_masked_targets_never_hit_and_their_share_is_told():
    ranks = make([(1, False, True), (1, False, False), (3, True, True), (2, True, False)])
    line = quality({"x": [ranks]}, resamples=20).loc["x"]
    assert line["cannot_hit"] == 0.5
    assert line["recall_10"] == 0.5
    assert line["recall_10_warm"] == 0.5


def test_intervals_cover_and_shrink():
    """Of 200 samples of a known rate about 95 % of the intervals hold it; ten times the users, a third the width."""
    generator = np.random.default_rng(5)
    hits = generator.random((400, 200)) < 0.2
    columns = hits.astype(float)
    low, high = np.quantile(bootstrap_means(columns, np.ones_like(columns), 400, 1), [0.025, 0.975], axis=0)
    covered = ((low <= 0.2) & (high >= 0.2)).mean()
    assert 0.89 < covered < 0.99
    big = np.tile(columns[:, :1], (10, 1))
    wide = np.diff(np.quantile(bootstrap_means(columns[:, :1], np.ones((400, 1)), 400, 1), [0.025, 0.975]))
    narrow = np.diff(np.quantile(bootstrap_means(big, np.ones_like(big), 400, 1), [0.025, 0.975]))
    assert narrow / wide == pytest.approx(10**-0.5, rel=0.2)


def test_bootstrap_equals_drawing_users_one_by_one():
    values = np.random.default_rng(0).random((7, 3))
    members = np.ones_like(values)
    members[::2, 1] = 0
    means = bootstrap_means(values, members, resamples=50, seed=3)
    drawn = np.random.default_rng(3).integers(7, size=(50, 7))
    assert means[:, 0] == pytest.approx(values[drawn, 0].mean(axis=1))
    with np.errstate(invalid="ignore"):
        expected = (values[drawn, 1] * members[drawn, 1]).sum(axis=1) / members[drawn, 1].sum(axis=1)
    assert means[:, 1] == pytest.approx(expected, nan_ok=True)


def test_bootstrap_in_chunks_is_the_whole(monkeypatch):
    values = np.random.default_rng(0).random((1500, 2))
    means = bootstrap_means(values, np.ones_like(values), resamples=4000, seed=1)
    assert means.shape == (4000, 2)
    assert means.std(axis=0) == pytest.approx(values.std(axis=0) / 1500**0.5, rel=0.1)


def test_draws_do_not_depend_on_the_other_rows():
    a, b = make([(1, False, False)] * 5 + [(20, False, False)] * 9), make([(9, True, False)] * 14)
    alone = quality({"a": [a]}).loc["a"]
    beside = quality({"b": [b], "a": [a]}).loc["a"]
    assert alone.equals(beside)


def test_no_cold_targets_and_no_rows():
    line = quality({"x": [make([(1, False, False), (12, False, False)])]}, resamples=20).loc["x"]
    assert np.isnan(line["recall_10_cold"])
    assert np.isnan(line["recall_10_cold_low"])
    assert line["recall_10_warm"] == 0.5
    assert "recall_10" in quality({}).columns


def test_seeds_on_different_targets_are_refused():
    one = make([(1, False, False), (2, False, False)])
    other = UserRanks(one.rank, one.target[::-1], one.cold, one.in_history)
    with pytest.raises(UserError, match="lora"):
        quality({"lora": [one, other]})
