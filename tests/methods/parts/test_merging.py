"""Token merging: schedules, matching and merging against plain loops, and what must never happen to a token."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from naive_merging import naive_merge
from torch import Tensor

from tpme.methods.parts.merging import (
    RELEASED,
    Matching,
    Reactivation,
    explicit_targets,
    match,
    merge,
    removable,
    scaled_targets,
    token_counts,
)

VIT_B, VIT_L = zip(RELEASED["low"], RELEASED["high"], strict=True)

# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "place"), [("low", 0), ("high", 1)])
@pytest.mark.parametrize("released", [VIT_B, VIT_L], ids=["ViT-B", "ViT-L"])
def test_a_vit_of_the_paper_gets_its_released_schedule(name: str, place: int, released: tuple[tuple[int, ...]]) -> None:
    depth = len(released[place])
    counts = token_counts(scaled_targets(name, 197, depth), 197, protected=1)
    assert tuple(before - after for before, after in pairwise(counts)) == released[place]


def test_vit_b_ends_with_11_or_5_tokens() -> None:
    assert token_counts(scaled_targets("low", 197, 12), 197, 1)[-1] == 11
    assert token_counts(scaled_targets("high", 197, 12), 197, 1)[-1] == 5


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("depth", [1, 2, 6, 12, 13, 32])
@pytest.mark.parametrize(("tokens", "protected"), [(2, 1), (5, 1), (4, 0), (50, 1), (196, 0), (257, 1)])
def test_a_scaled_schedule_keeps_the_released_share(name: str, depth: int, tokens: int, protected: int) -> None:
    targets = scaled_targets(name, tokens, depth, protected=protected)
    counts = token_counts(targets, tokens, protected)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    released = min(RELEASED[name], key=lambda schedule: abs(len(schedule) - depth))
    if depth == len(released):
        kept = 197 - np.cumsum(released)
        expected = protected + (tokens - protected) * (kept - 1) / 196
        np.testing.assert_allclose(targets, np.maximum(expected, 1), atol=0.5)


def test_a_text_keeps_at_least_the_floor() -> None:
    targets = scaled_targets("high", 30, 12, floor=8)
    assert targets[0] == 1 + round(29 * (157 - 1) / 196)
    assert min(targets) == targets[-1] == 8


def test_a_layer_removes_every_other_token_at_most() -> None:
    assert removable(9, 1, protected=1) == 4
    assert removable(8, 1, protected=1) == 3
    assert removable(8, 1, protected=0) == 4
    assert removable(8, 10, protected=1) == 0
    assert explicit_targets((100, 2, 0), 9, protected=1) == [5, 3, 3]


# --- matching and merging -------------------------------------------------------------------------------------------


def trained_gate(width: int, pairs: int) -> Reactivation:
    gate = Reactivation(width, pairs)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("tokens", "pairs", "protected"), [(9, 4, 1), (8, 3, 1), (8, 4, 0), (7, 1, 1), (2, 1, 0)])
def test_it_merges_as_plain_loops_do(tokens: int, pairs: int, protected: int, gated: bool) -> None:
    hidden, metric = torch.randn(3, tokens, 6), torch.randn(3, tokens, 4)
    sizes = torch.randint(1, 5, (3, tokens)).float()
    gate = trained_gate(6, pairs + 2) if gated else None  # a vector made for more pairs is cut
    merged, new_sizes = merge(hidden, sizes, match(metric, pairs, protected=protected), gate)
    for item in range(3):
        expected, expected_sizes = naive_merge(hidden[item], metric[item], sizes[item], pairs, protected, gate)
        torch.testing.assert_close(merged[item], expected)
        torch.testing.assert_close(new_sizes[item], expected_sizes)


def test_merging_is_differentiated_as_plain_loops_are() -> None:
    hidden, metric = torch.randn(1, 9, 6, requires_grad=True), torch.randn(1, 9, 4)
    sizes, weight, gate = torch.randint(1, 5, (1, 9)).float(), torch.randn(5, 6), trained_gate(6, 4)
    (merge(hidden, sizes, match(metric, 4, protected=1), gate)[0] * weight).sum().backward()
    again, twin = hidden.detach().clone().requires_grad_(), copy.deepcopy(gate)
    twin.zero_grad()
    (naive_merge(again[0], metric[0], sizes[0], 4, 1, twin)[0] * weight).sum().backward()
    torch.testing.assert_close(hidden.grad, again.grad)
    for (name, mine), plain in zip(gate.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, msg=name)


def test_sizes_add_up_and_token_0_stays() -> None:
    metric = torch.randn(64, 17, 4)
    metric[:, ::2] = metric[:, :1]  # token 0 is as similar to every partner as all other sources
    matching = match(metric, 8, protected=1)
    assert (matching.kept[:, 0] == 0).all()
    assert not (matching.source == 0).any()
    _, sizes = merge(torch.randn(64, 17, 4), torch.ones(64, 17), matching)
    assert torch.equal(sizes.sum(1), torch.full((64,), 17.0))
    assert torch.equal(sizes[:, 0], torch.ones(64))


def test_equal_tokens_merge_in_their_order() -> None:
    matching = match(torch.ones(2, 9, 4), 3, protected=1)
    assert matching.source.tolist() == [[2, 4, 6]] * 2
    assert matching.kept.tolist() == [[0, 8, 1, 3, 5, 7]] * 2


def test_it_starts_as_the_plain_mean() -> None:
    hidden, matching = torch.randn(2, 9, 6), match(torch.randn(2, 9, 4), 4, protected=1)
    plain, _ = merge(hidden, torch.ones(2, 9), matching)
    gated, _ = merge(hidden, torch.ones(2, 9), matching, Reactivation(6, 4))
    torch.testing.assert_close(gated, plain)


# --- padding --------------------------------------------------------------------------------------------------------


def merge_padded(
    hidden: Tensor, metric: Tensor, lengths: list[int], width: int, gate: Reactivation
) -> tuple[Matching, Tensor, Tensor]:
    """Titles of ``lengths`` tokens padded with garbage to ``width`` merge down to five tokens, at most three pairs."""
    padded = [
        torch.cat([x[:, : max(lengths)], torch.full((len(x), width, x.shape[2]), 9.0)], 1) for x in (hidden, metric)
    ]
    sizes = (torch.arange(width) < torch.tensor(lengths)[:, None]).float()
    pairs = min(removable(width, 5, 1), 3)
    matching = match(padded[1][:, :width], pairs, protected=1, real=sizes > 0, keep=5)
    return matching, *merge(padded[0][:, :width], sizes, matching, gate)


def test_padding_merges_with_nothing_and_changes_nothing() -> None:
    lengths, gate = [8, 7, 6, 5, 4, 2, 1], trained_gate(6, 3)
    hidden, metric = torch.randn(7, 8, 6), torch.randn(7, 8, 4)
    matching, merged, sizes = merge_padded(hidden, metric, lengths, 8, gate)
    assert matching.merges is not None
    assert matching.merges.sum(1).tolist() == [3, 2, 1, 0, 0, 0, 0]
    assert sizes.sum(1).tolist() == lengths
    assert (sizes > 0).sum(1).tolist() == [5, 5, 5, 5, 4, 2, 1]
    _, longer, longer_sizes = merge_padded(hidden, metric, lengths, 13, gate)
    assert torch.equal(longer_sizes[:, :5], sizes)
    assert not longer_sizes[:, 5:].any()
    real = sizes > 0
    torch.testing.assert_close(longer[:, :5][real], merged[real])
    for item in (0, 1, 2):  # as the title alone merges
        expected, expected_sizes = naive_merge(
            hidden[item, : lengths[item]],
            metric[item],
            torch.ones(lengths[item]),
            lengths[item] - 5,
            1,
            gate,
            text=True,
        )
        torch.testing.assert_close(merged[item], expected)
        torch.testing.assert_close(sizes[item], expected_sizes)
    for item in (3, 4, 5, 6):  # only padding is dropped
        assert torch.equal(merged[item, : lengths[item]], hidden[item, : lengths[item]])
