"""The baseline: the same work done as the reference implementation does it (IISAN's release), written anew.

Every slot is encoded, padding included; the loss loops over users and positions; evaluation sorts the whole catalogue
once a user; cached states are one file an item and modality, a tensor of all 13 hidden states in float32. Nothing is
slowed down on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tpme.bench.record import Modality
from tpme.bench.task.items import Items
from tpme.bench.task.recommender import Recommender
from tpme.methods.parts.side_network import SideNetwork

MASKED = -1e4
STATES = 13
"""Hidden states of a 12-layer encoder, the embeddings' included."""


def loss(ids: Tensor, log_p: Tensor, vectors: Tensor, users: Tensor) -> Tensor:
    """The in-batch loss over all B S slots, masked user by user and position by position.

    Args:
        ids: (B, S) int64, left-padded with 0. log_p: (B S,) log popularity of each slot's item.
        vectors: (B S, d). users: (B, L, d).
    """
    b, slots = ids.shape
    logits = users @ vectors.T - log_p  # (B, L, B S)
    flat = ids.flatten()
    masked = (flat == 0).expand(b, slots - 1, -1).clone()
    for user in range(b):
        own = torch.isin(flat, ids[user])
        for position in range(slots - 1):
            target = user * slots + position + 1
            row = masked[user, position]
            row |= own
            row[target] = False
    logits = logits.masked_fill(masked, MASKED).flatten(0, 1)
    labels = _labels(ids)
    valid = ids[:, :-1].flatten() > 0
    return functional.cross_entropy(logits[valid], labels[valid])


def vectorised_loss(ids: Tensor, log_p: Tensor, vectors: Tensor, users: Tensor) -> Tensor:
    """The same without the loop, still with a column a slot and a row a padded position: what calibrates ``loss``."""
    b, slots = ids.shape
    logits = users @ vectors.T - log_p
    flat = ids.flatten()
    masked = ((ids[:, :, None] == flat).any(dim=1) | (flat == 0))[:, None].repeat(1, slots - 1, 1)
    labels = _labels(ids)
    masked.scatter_(2, labels.view(b, -1, 1), False)
    valid = (ids[:, :-1] > 0).flatten()
    logits = logits.masked_fill(masked, MASKED).flatten(0, 1)
    return functional.cross_entropy(logits[valid], labels[valid])


def _labels(ids: Tensor) -> Tensor:
    """Columns of the slots after the inputs of ids (B, S): (B L,)."""
    b, slots = ids.shape
    return (torch.arange(b, device=ids.device)[:, None] * slots + torch.arange(1, slots, device=ids.device)).flatten()


@torch.no_grad()
def ranks(users: Tensor, items: Tensor, target: Tensor, history: Tensor) -> NDArray[np.int64]:
    """Ranks (U,) from one full sort of the catalogue a user; earlier items get -inf. Shapes as ``rank_targets``."""
    found = []
    for user in range(len(users)):
        scores = items[1:] @ users[user]
        earlier = history[user]
        scores[earlier[earlier > 0] - 1] = -torch.inf
        order = torch.argsort(scores, descending=True)
        found.append(int((order == target[user] - 1).nonzero()[0, 0]) + 1)
    return np.array(found)


@torch.no_grad()
def counted_ranks(users: Tensor, items: Tensor, target: Tensor, history: Tensor) -> NDArray[np.int64]:
    """The same by counting what scores higher, user by user: what calibrates ``ranks``."""
    found = []
    for user in range(len(users)):
        scores = items[1:] @ users[user]
        earlier = history[user]
        wanted = scores[target[user] - 1].clone()
        scores[earlier[earlier > 0] - 1] = -torch.inf
        found.append(int((scores > wanted).sum()) + 1)
    return np.array(found)


@torch.no_grad()
def float32_ranks(users: Tensor, items: Tensor, target: Tensor, history: Tensor, chunk: int = 100) -> Tensor:
    """Ranks (U,) as float32 scores give them, ties left to the kernel: a product, a comparison and a sum a chunk."""
    found = []
    for start in range(0, len(users), chunk):
        part = slice(start, start + chunk)
        own = target[part, None] - 1
        scores = users[part] @ items[1:].T
        wanted = scores.gather(1, own)
        scores.scatter_(1, torch.cat([own, torch.where(history[part] > 0, history[part] - 1, own)], dim=1), -torch.inf)
        found.append(1 + scores.ge_(wanted).sum(dim=1).long())
    return torch.cat(found)


def all_states(model: Recommender, items: Items) -> dict[Modality, Tensor]:
    """Every hidden state of every token of all items, kept until the used ones are picked: (n, levels, D)."""
    found: dict[Modality, Tensor] = {}
    for modality, view in model.views.items():
        if modality == "text":
            inputs = {"input_ids": items.tokens, "attention_mask": items.token_mask}
        else:
            assert items.image is not None
            inputs = {"pixel_values": (items.image.float() / 255 - 0.5) / 0.5}
        hidden = view.module(**inputs, output_hidden_states=True).hidden_states
        levels = model.item_encoder.reads[modality].levels
        found[modality] = torch.stack([hidden[level] for level in levels], dim=1)[:, :, 0]
    return found


def padded_step(model: Recommender, items: Items, ids: Tensor, log_p: Tensor) -> Tensor:
    """Loss of one batch, every one of its B S slots encoded. items: all slots, row by row. ids: (B, S)."""
    states = all_states(model, items) if model.frozen.issuperset(model.views) else model.hidden_states(items)
    vectors = model.item_encoder(states, items.ids)
    return _loss_of(model, vectors, ids, log_p)


def _loss_of(model: Recommender, vectors: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    sequences = vectors.unflatten(0, ids.shape)[:, :-1]
    return loss(ids, log_p, vectors, model.user_vectors(sequences, ids[:, :-1] > 0))


class StateFiles:
    """Cached states as one file an item and modality, (13, D) float32 each; every second one is used.

    Args:
        folder: for the files. states: (N+1, 7, D) by modality.
    """

    def __init__(self, folder: Path, states: Mapping[Modality, Tensor]) -> None:
        self.folder, self.states = folder, states
        self.width = next(iter(states.values())).shape[-1]

    def write(self, ids: NDArray[np.int64]) -> None:
        """Write the states of items ``ids``."""
        for modality, table in self.states.items():
            for item in ids:
                full = torch.zeros(STATES, self.width)
                full[::2] = table[item]
                torch.save(full, self._path(modality, item))

    def read(self, ids: Tensor) -> dict[Modality, Tensor]:
        """States (B S, 13, D) of all slots; zeros for padding."""
        flat = ids.flatten().tolist()
        nothing = torch.zeros(STATES, self.width)
        return {
            modality: torch.stack([torch.load(self._path(modality, item)) if item else nothing for item in flat])
            for modality in self.states
        }

    def _path(self, modality: Modality, item: int) -> Path:
        return self.folder / f"{modality}-{item}"


def cached_loss(model: Recommender, states: Mapping[Modality, Tensor], ids: Tensor, log_p: Tensor) -> Tensor:
    """Loss of one batch of B S slots from states (B S, 13, D), through IISAN's towers and two-layer heads."""
    network = model.item_encoder
    assert isinstance(network, SideNetwork)
    used = {modality: table[:, ::2] for modality, table in states.items()}
    outputs = []
    for name, tower in network.towers.items():
        gates = tower.gate_values()
        side = torch.zeros_like(used["text"][:, 0])
        for k, block in enumerate(tower.blocks):
            if name == "inter":
                side = side + gates[k] * used["image"][:, k] + (1 - gates[k]) * used["text"][:, k]
            else:
                side = gates[k] * used[name][:, k] + (1 - gates[k]) * side
            side = block(side)
        first, last = network.heads[name]
        outputs.append(last(first(side)))
    return _loss_of(model, network.fusion(torch.cat(outputs, dim=1)), ids, log_p)
