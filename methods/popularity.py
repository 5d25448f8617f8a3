"""Popularity: the same list for everyone; the floor under every other row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import ItemEncoder, Recommender
from tpme.methods.base import Method, Schedule, TaskShape


class _Counts(ItemEncoder):
    """One number an item: how often it was trained on."""

    counts: Tensor

    def __init__(self, items: int) -> None:
        super().__init__({})
        self.register_buffer("counts", torch.zeros(items + 1, 1))

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        return self.counts[ids]


class _AnyUser(nn.Module):
    """The user vector 1: every user's score of an item is its count."""

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        return torch.ones_like(vectors)


class Popularity(Method):
    """Score = training popularity. Nothing trains."""

    baseline = True
    modalities = ()

    def item_encoder(self, task: TaskShape) -> ItemEncoder:
        """One number an item."""
        return _Counts(task.items)

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Take the training counts and drop the sequential encoder."""
        assert isinstance(model.item_encoder, _Counts)
        model.item_encoder.counts.copy_(torch.from_numpy(schedule.popularity)[:, None])
        model.sequence = _AnyUser()

    def state(self, model: Recommender) -> dict[str, Tensor]:
        """The counts."""
        return {"counts": model.item_encoder.get_buffer("counts")}

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Put the counts back. Raises KeyError for anything else."""
        if set(state) != {"counts"}:
            raise KeyError(f"state of another structure: {sorted(state)} instead of ['counts']")
        model.item_encoder.get_buffer("counts").copy_(state["counts"])
