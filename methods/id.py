"""ID-only SASRec (Kang and McAuley, ICDM 2018): one learned vector per item, no content."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import ItemEncoder
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, TaskShape


class ItemTable(ItemEncoder):
    """A learned vector (d,) for each item id."""

    group = "method"

    def __init__(self, items: int, dim: int) -> None:
        super().__init__({})
        self.table = nn.Embedding(items + 1, dim, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.02)
        with torch.no_grad():
            self.table.weight[0].zero_()  # padding

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        """Look up item ids (n,); returns (n, d)."""
        vectors: Tensor = self.table(ids)
        return vectors


class ItemIDs(Method):
    """Trains one vector per item in place of the encoders; sequential encoder and loss stay the same.

    ``v_i = E[i]``, one vector (d,) of each item, N(0, 0.02) at the start; padding is zero.

    Trains: the table E, (N + 1) d: 1,300,160 for 20,314 items.
    Saves: the encoders, in training and at inference; the stored table grows with the catalogue.
    Source: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.
    """

    baseline = True
    modalities = ()

    def item_encoder(self, task: TaskShape) -> ItemTable:
        """An embedding table over all items."""
        return ItemTable(task.items, task.dim)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """A vector of each item and of padding: (N + 1) d."""
        return (task.items + 1) * task.dim
