"""What clients compute before the rounds, on frozen encoders without prompts: states of items, scores of layers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.record import Modality
from tpme.bench.task.items import Items, map_tensors
from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Context
from tpme.methods.parts.federation import Federation
from tpme.methods.parts.federation_layers import layer_scores

SCORED = 32
"""The most items of a client that score the layers."""
SCORE_BYTES = 4
"""Of the score of one layer, sent to the server."""


@torch.no_grad()
def final_states(model: Recommender, modality: Modality, items: Items) -> Tensor:
    """Final states (n, D) of one encoder, as the item encoder reads them."""
    states = model.states(modality, items)
    assert isinstance(states, Tensor)
    return states[:, -1]


def first_items(context: Context, users: NDArray[np.int64]) -> Items:
    """The distinct items of the first batch of ``users``, without padding."""
    items = next(iter(context.batches(users))).items
    ids, rows = np.unique(items.ids.cpu().numpy(), return_index=True)
    kept = torch.from_numpy(rows[ids > 0]).to(items.ids.device)
    return map_tensors(items, lambda tensor: tensor[kept])


def federated_scores(context: Context, federation: Federation) -> tuple[dict[Modality, list[float]], int]:
    """Scores of all layers by modality, ``sum_k (n_k / n) s_k``, and the bytes that clients sent for it.

    Every client takes the same number of items, because a score depends on it: ``SCORED``, or as many as the client
    with the fewest has in its first batch.
    """
    model, clients = context.state.model.eval(), federation.clients
    fewest = min(min(len(first_items(context, users)) for users in clients), SCORED)
    scores: dict[Modality, NDArray[np.float64]] = {}
    for users in clients:
        items = map_tensors(first_items(context, users), lambda tensor: tensor[:fewest])
        for modality, view in model.views.items():
            inputs = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
            own = len(users) / len(context.users) * np.array(layer_scores(view, **inputs))
            scores[modality] = scores.get(modality, np.zeros_like(own)) + own
    sent = SCORE_BYTES * len(clients) * sum(map(len, scores.values()))
    return {modality: values.tolist() for modality, values in scores.items()}, sent
