from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.record import Protocol
from tpme.bench.task.batches import ItemStore, build_batch
from tpme.bench.task.loss import MASKED_LOGIT, Candidates, in_batch_logits, in_batch_loss

NO_INPUTS = ItemStore(None)
"""Gives item ids alone: all that the loss is about."""


def candidates(slots: NDArray[np.int32], log_p: NDArray[np.float32], protocol: Protocol) -> Candidates:
    return build_batch(slots, log_p, NO_INPUTS, protocol).candidates


def brute_force(users: Tensor, slot_vectors: Tensor, slots: NDArray[np.int32], log_p: NDArray[np.float32]) -> float:
    """The loss as it is written down: a candidate a slot, one position after the other. users (B, L, d)."""
    terms, flat = [], slots.reshape(-1)
    for b, row in enumerate(slots):
        for position in range(slots.shape[1] - 1):
            if row[position] == 0:
                continue
            target = b * slots.shape[1] + position + 1
            logits = []
            for column, item in enumerate(flat):
                allowed = column == target or (item > 0 and item not in row)
                score = float(users[b, position] @ slot_vectors[column]) - float(log_p[item])
                logits.append(score if allowed else MASKED_LOGIT)
            top = max(logits)
            terms.append(top + math.log(sum(math.exp(x - top) for x in logits)) - logits[target])
    return sum(terms) / len(terms)


def test_golden(shared: Callable[..., Path]) -> None:
    """Logits, loss and both gradients of the reference, every slot being a candidate."""
    data = np.load(shared("golden", "loss_small.npz"))
    users = torch.tensor(data["user_vecs"], requires_grad=True)
    vectors = torch.tensor(data["score_embs"], requires_grad=True)
    p = data["pop_prob"]
    log_p = np.log(np.where(p > 0, p, 1.0)).astype(np.float32)
    columns = candidates(data["item_ids"].astype(np.int32), log_p, "paper")

    assert columns.rows.tolist() == np.flatnonzero(data["log_mask"]).tolist()
    assert columns.target.tolist() == data["labels_valid"].tolist()
    logits = in_batch_logits(users, vectors, columns)
    torch.testing.assert_close(logits, torch.tensor(data["logits_valid"]), atol=1e-4, rtol=1e-4)
    loss = in_batch_loss(users, vectors, columns)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(data["loss"]), abs=1e-4)
    torch.testing.assert_close(users.grad, torch.tensor(data["grad_user_vecs"]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vectors.grad, torch.tensor(data["grad_score_embs"]), atol=1e-4, rtol=1e-4)


@st.composite
def batches(draw: st.DrawFn) -> tuple[NDArray[np.int32], int]:
    """Left-padded slots of a few users who share and repeat items, and a seed."""
    users, width = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    slots = np.zeros((users, width), dtype=np.int32)
    for row in slots:
        length = draw(st.integers(2, width))
        row[-length:] = draw(st.lists(st.integers(1, 6), min_size=length, max_size=length))
    return slots, draw(st.integers(0, 2**16))


def values(slots: NDArray[np.int32], seed: int) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(slots.shape[0], slots.shape[1] - 1, 3, generator=generator)
    table = torch.randn(7, 3, generator=generator)
    log_p = np.log(np.random.default_rng(seed).uniform(0.01, 1, 7)).astype(np.float32)
    log_p[0] = 0
    return users, table, log_p


@settings(max_examples=60, deadline=None)
@given(batches())
def test_equals_the_definition(drawn: tuple[NDArray[np.int32], int]) -> None:
    slots, seed = drawn
    users, table, log_p = values(slots, seed)
    slot_vectors = table[torch.from_numpy(slots.reshape(-1).astype(np.int64))]
    expected = brute_force(users, slot_vectors, slots, log_p)
    slotwise = in_batch_loss(users, slot_vectors, candidates(slots, log_p, "paper"))
    distinct = table[torch.from_numpy(np.unique(slots[slots > 0]).astype(np.int64))]
    itemwise = in_batch_loss(users, distinct, candidates(slots, log_p, "suite"))
    assert float(slotwise) == pytest.approx(expected, abs=1e-4)
    assert float(itemwise) == pytest.approx(expected, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(batches())
def test_distinct_items_give_the_gradients_of_all_slots(drawn: tuple[NDArray[np.int32], int]) -> None:
    slots, seed = drawn
    users, table, log_p = values(slots, seed)
    gradients = []
    for protocol in ("paper", "suite"):
        ids = slots.reshape(-1) if protocol == "paper" else np.unique(slots[slots > 0])
        u, t = users.clone().requires_grad_(), table.clone().requires_grad_()
        in_batch_loss(u, t[torch.from_numpy(ids.astype(np.int64))], candidates(slots, log_p, protocol)).backward()
        assert t.grad is not None
        gradients.append((u.grad, t.grad[1:]))
    for slotwise, itemwise in zip(*gradients, strict=True):
        torch.testing.assert_close(slotwise, itemwise, atol=1e-5, rtol=1e-4)


def test_padding_cannot_influence_the_loss() -> None:
    slots = np.array([[0, 0, 1, 2], [3, 1, 2, 4]], dtype=np.int32)
    users, table, log_p = values(slots, 0)
    columns = candidates(slots, log_p, "paper")
    ids = torch.from_numpy(slots.reshape(-1).astype(np.int64))
    loss = in_batch_loss(users, table[ids], columns)
    table[0] = 1e3
    users[0, :2] = 1e3
    assert float(in_batch_loss(users, table[ids], columns)) == float(loss)


def test_a_users_own_items_are_masked_except_the_target() -> None:
    slots = np.array([[1, 2, 1], [3, 4, 5]], dtype=np.int32)
    users, table, log_p = values(slots, 1)
    columns = candidates(slots, log_p, "suite")  # columns 0..4 are items 1..5
    logits = in_batch_logits(users, table[1:6], columns)
    first, second = logits[0], logits[1]  # user 0: predicts item 2, then item 1
    assert (first == MASKED_LOGIT).tolist() == [True, False, False, False, False]
    assert (second == MASKED_LOGIT).tolist() == [False, True, False, False, False]


def test_loss_is_float32_under_autocast() -> None:
    slots = np.array([[1, 2, 3], [3, 4, 5]], dtype=np.int32)
    users, table, log_p = values(slots, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = in_batch_loss(users.bfloat16(), table[1:6].bfloat16(), candidates(slots, log_p, "suite"))
    assert loss.dtype == torch.float32
