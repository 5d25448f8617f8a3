"""The loss alone, forward and backward, on real sequences."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tpme.bench.task.batches import ItemStore, build_batch, log_popularity
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.loss import in_batch_loss

PRINTED_S = 0.0088 + 0.0067
"""Batch 64, two cores: the reference's loss, forward and backward."""
DIM = 64


def both(
    users_per_batch: int, data: Dataset, looped: ModuleType, device: torch.device
) -> tuple[list[Callable[[], tuple[Tensor, ...]]], Any]:
    """Loss and gradients of one batch: looped, vectorised, and the suite's. Item vectors start equal by item."""
    torch.manual_seed(0)
    slots = data.train_slots[:users_per_batch]
    log_p = log_popularity(data)
    batch = build_batch(slots, log_p, ItemStore(data), "suite").to(device)
    distinct = torch.randn(len(batch.items), DIM, device=device, requires_grad=True)
    users = torch.randn(*slots[:, :-1].shape, DIM, device=device, requires_grad=True)
    ids = torch.from_numpy(slots.astype("int64")).to(device)
    slot_log_p = torch.from_numpy(log_p).to(device)[ids.flatten()]
    padded = torch.zeros(ids.numel(), DIM, device=device)
    real = ids.flatten() > 0
    padded[real] = distinct.detach()[batch.slot.flatten()[real]]
    padded.requires_grad_()

    def run(loss: Callable[..., Tensor], vectors: Tensor, *args: Any) -> tuple[Tensor, ...]:
        value = loss(*args)
        return value.detach(), *torch.autograd.grad(value, (vectors, users))

    works = [
        lambda: run(looped.loss, padded, ids, slot_log_p, padded, users),
        lambda: run(looped.vectorised_loss, padded, ids, slot_log_p, padded, users),
        lambda: run(in_batch_loss, distinct, users, distinct, batch.candidates),
    ]
    return works, (batch, real)


@pytest.mark.parametrize("users", [64, 512])
def test_the_loss_without_a_loop(
    users: int,
    scientific: Dataset,
    looped: ModuleType,
    compare: Any,
    printed: Any,
    device: torch.device,
) -> None:
    works, (batch, real) = both(users, scientific, looped, device)
    value, slot_grad, user_grad = works[0]()
    ours, item_grad, our_user_grad = works[2]()
    by_item = torch.zeros_like(item_grad).index_add(0, batch.slot.flatten()[real], slot_grad[real])
    assert torch.allclose(value, ours, atol=1e-5)
    assert torch.allclose(by_item, item_grad, atol=1e-5)
    assert torch.allclose(user_grad, our_user_grad, atol=1e-6)
    assert torch.allclose(works[1]()[0], value, atol=1e-5)
    compare(
        f"loss, forward and backward, batch {users}",
        works[0],
        works[2],
        20 if device.type == "cuda" else 5,
        printed=printed(PRINTED_S) if users == 64 else None,
    )
