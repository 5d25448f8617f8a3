"""Popularity: the same ranking for all users; the weakest baseline."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import ItemEncoder, Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule, TaskShape


class _Counts(ItemEncoder):
    """One number per item: its share of the training interactions."""

    counts: Tensor

    def __init__(self, items: int) -> None:
        super().__init__({})
        self.register_buffer("counts", torch.zeros(items + 1, 1))

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        return self.counts[ids]


class _ConstantUser(nn.Module):
    """A constant user vector 1, which makes every user's score of an item its popularity."""

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        return torch.ones_like(vectors)


class Popularity(Method):
    """Ranks items by their popularity in training, the same for all users.

    ``score(u, i) = n_i / sum_j n_j``, n_i the training interactions of item i.

    Trains: nothing.
    Saves: everything but one number an item; the weakest baseline.
    Source: common practice.
    """

    baseline = True
    modalities = ()

    def item_encoder(self, task: TaskShape) -> ItemEncoder:
        """One number per item."""
        return _Counts(task.items)

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Set the popularity and replace the sequential encoder."""
        assert isinstance(model.item_encoder, _Counts)
        model.item_encoder.counts.copy_(torch.from_numpy(schedule.popularity)[:, None])
        model.sequence = _ConstantUser()

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """None."""
        return 0

    def state(self, model: Recommender) -> dict[str, Tensor]:
        """The counts."""
        return {"counts": model.item_encoder.get_buffer("counts")}

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Load the counts. Raises KeyError for any other state."""
        if set(state) != {"counts"}:
            raise KeyError(f"state of another structure: {sorted(state)} instead of ['counts']")
        model.item_encoder.get_buffer("counts").copy_(state["counts"])
