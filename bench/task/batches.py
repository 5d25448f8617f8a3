"""Batches of users, assembled by vectorised gathers without Python loops over users, positions or items.

Protocol ``suite`` encodes each distinct item of a batch once, and no padding. Protocol ``paper`` encodes every slot,
padding included, like the reference implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.record import Modality, Protocol
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.dealing import Peers, Share, sharing
from tpme.bench.task.items import Items, States, TokenStates, map_tensors, named_tensors
from tpme.bench.task.loss import Candidates
from tpme.bench.task.placement import ItemShard, Table, owners
from tpme.bench.task.precomputed import MappedStates
from tpme.bench.task.tokens import TokenTable


class ItemStore:
    """The inputs of items: tokens, images, and the hidden states of encoders that do not run.

    Args:
        dataset: the prepared data set. tokens: its tokenised titles, for a text encoder. images: read images, too.
        states: hidden states of all items by modality, N+1 rows; or of those that this rank encodes.
        pin: gather states into page-locked memory, for the copy to a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        tokens: TokenTable | None = None,
        images: bool = False,
        states: Mapping[Modality, Table | ItemShard] | None = None,
        pin: bool = False,
    ) -> None:
        self.dataset, self.tokens, self.images, self.pin = dataset, tokens, images, pin
        self.states = dict(states or {})

    @property
    def every_token(self) -> bool:
        """Whether an item is the tokens or pixels of an encoder, or the states of every token."""
        inputs = self.tokens is not None or self.images
        tables = (table.own if isinstance(table, ItemShard) else table for table in self.states.values())
        return inputs or any(isinstance(table, TokenStates) for table in tables)

    def owners(self, ids: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
        """Which rank encodes each of the items ``ids`` (n,), every one of them at least one.

        Where each rank keeps the states of its own items, they are dealt to it.
        """
        evenly = np.arange(len(ids)) % ranks
        if not any(isinstance(table, ItemShard) for table in self.states.values()):
            return evenly
        keeps = np.where(ids > 0, owners(ids, ranks), evenly)
        return keeps if np.bincount(keeps, minlength=ranks).all() else evenly

    def gather(self, ids: NDArray[np.int64]) -> Items:
        """The inputs of items ``ids`` (n,), on the host; tables kept on a device are passed on whole."""
        index = torch.from_numpy(ids)
        tokens = mask = image = None
        if self.tokens is not None:
            tokens = torch.from_numpy(self.tokens.ids[ids].astype(np.int64))
            positions = np.arange(tokens.shape[1])
            # Padding (item 0) has no tokens, and an empty mask gives NaN in some attention kernels: unmask its token 0.
            lengths = np.maximum(self.tokens.lengths[ids], 1)[:, None]
            mask = torch.from_numpy((positions < lengths).astype(np.int64))
        if self.images:
            image = torch.from_numpy(self.dataset.gather_images(ids))
        states: dict[Modality, States] = {}
        tables: dict[Modality, States] = {}
        rows = ids
        for modality, kept in self.states.items():
            table, rows = kept.locate(ids) if isinstance(kept, ItemShard) else (kept, ids)
            if not isinstance(table, MappedStates) and named_tensors(table)["states"].device.type != "cpu":
                tables[modality] = table
            else:
                states[modality] = _rows(table, rows, pin=self.pin)
        table_rows = torch.from_numpy(rows) if tables and rows is not ids else None
        return Items(index, tokens, mask, image, states or None, tables or None, table_rows)


def _rows(table: Table, ids: NDArray[np.int64], *, pin: bool) -> States:
    """Rows ``ids`` (n,) of a table on the host."""
    if isinstance(table, MappedStates):
        return table.take(ids, pin=pin)
    return map_tensors(table, lambda values: _taken(values, ids, pin=pin))


def _taken(table: Tensor, ids: NDArray[np.int64], *, pin: bool) -> Tensor:
    """Rows ``ids`` (n,) of a tensor on the host.

    Uses numpy: torch would start further CPU threads from the thread that assembles batches, which compete with those
    of the training step and slow it several times.
    """
    rows = torch.empty((len(ids), *table.shape[1:]), dtype=table.dtype, pin_memory=pin)
    # mode="raise" copies through a buffer; all ids are valid here.
    np.take(_numpy(table), ids, axis=0, out=_numpy(rows), mode="clip")
    return rows


def _numpy(values: Tensor) -> NDArray[Any]:
    """The memory of ``values``; of bfloat16, which numpy does not know, as integers."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


@dataclass(frozen=True)
class Batch:
    """One training batch of B users with S = L+1 slots.

    items: the items to encode, n rows. slot: (B, S) int64, the row of ``items`` in each slot (any row for padding).
    mask: (B, L) bool, input slots that hold an item. candidates: the columns of the loss; column c is row c of items.

    On several devices, ``share`` says which of the n items are encoded here: ``items`` holds these alone, while slots,
    mask and positions are those of this rank's users. ``None``: the whole batch.
    """

    items: Items
    slot: Tensor
    mask: Tensor
    candidates: Candidates
    share: Share | None = None

    def pin(self) -> Batch:
        """Page-lock all tensors, for asynchronous copies to a GPU."""
        return map_tensors(self, lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``, asynchronously from pinned memory.

        Uses the stream of the kernels: on a separate stream the host, which runs many steps ahead, would fill the
        device with waiting batches.
        """
        moved = map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, items=moved.items.looked_up())


def build_batch(
    slots: NDArray[np.int32],
    log_p: NDArray[np.float32],
    store: ItemStore,
    protocol: Protocol,
    peers: Peers | None = None,
) -> Batch:
    """Assemble one batch.

    Args:
        slots: (B, S) item ids, left-padded with 0.
        log_p: (N+1,) log training popularity; entry 0 is 0.
        store: the item inputs. protocol: encode distinct items (``suite``) or every slot (``paper``).
        peers: the ranks that share the batch; one with fewer users or items than ranks is not shared, and each rank
            then computes all of it.
    """
    real = slots > 0
    distinct, place = np.unique(slots[real], return_inverse=True)
    n = len(distinct)
    item_of_slot = np.full(slots.shape, n, dtype=np.int64)
    item_of_slot[real] = place
    # A position with an item predicts the next slot, which also holds one: padding is on the left.
    rows = np.flatnonzero(real[:, :-1])
    next_slot = rows + rows // (slots.shape[1] - 1) + 1  # index of the next slot in the flattened (B, S)
    if protocol == "paper":
        ids = slots.reshape(-1).astype(np.int64)
        slot = np.arange(ids.size).reshape(slots.shape)
        item, target = item_of_slot.reshape(-1), next_slot
        count = np.ones(ids.size, dtype=np.float32)
    else:
        ids = distinct.astype(np.int64)
        slot = np.where(real, item_of_slot, 0)
        item, target = np.arange(n), item_of_slot.reshape(-1)[next_slot]
        count = np.bincount(place, minlength=n).astype(np.float32)
    mask, own_ids, share = real[:, :-1], ids, None
    peers = sharing(peers, min(len(slots), len(ids)))
    if peers is not None:
        share = Share.of(peers, store.owners(ids, peers.size), len(rows))
        own_ids = ids[share.rows.numpy()]
        first, last = (len(slots) * r // peers.size for r in (peers.rank, peers.rank + 1))
        slot, mask, item_of_slot = slot[first:last], mask[first:last], item_of_slot[first:last]
        length = mask.shape[1]
        own = (rows >= first * length) & (rows < last * length)
        rows, target = rows[own] - first * length, target[own]
    candidates = Candidates(
        log_p=torch.from_numpy(log_p[ids]),
        log_count=torch.from_numpy(np.log(count)),
        item=torch.from_numpy(item),
        slots=torch.from_numpy(item_of_slot),
        rows=torch.from_numpy(rows),
        target=torch.from_numpy(target),
        distinct=n,
    )
    return Batch(store.gather(own_ids), torch.from_numpy(slot), torch.from_numpy(mask.copy()), candidates, share=share)


def log_popularity(dataset: Dataset) -> NDArray[np.float32]:
    """log p(item), (N+1,), with p(0) = 1. Items never trained on get 0, not -inf: they are never candidates."""
    p = dataset.popularity
    return np.log(np.where(p > 0, p, 1.0)).astype(np.float32)


class TrainBatches:
    """Shuffled training batches, each assembled in a thread while the previous one trains.

    Args:
        dataset, store, protocol: see ``build_batch``. users_per_batch: B. seed: of the order of users, the same for
            every method. steps: batches of an epoch. device: where batches are moved. peers: the ranks that share
            every batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        store: ItemStore,
        *,
        users_per_batch: int,
        protocol: Protocol,
        seed: int,
        steps: int,
        device: torch.device,
        peers: Peers | None = None,
    ) -> None:
        self.peers = peers
        self.slots, self.log_p, self.store = dataset.train_slots, log_popularity(dataset), store
        self.size, self.protocol, self.seed, self.device = users_per_batch, protocol, seed, device
        self.steps, self.users = steps, np.arange(len(self.slots))

    def of(self, users: NDArray[np.int64], steps: int) -> TrainBatches:
        """The batches of these users alone, rows of the training slots, ``steps`` an epoch."""
        part = copy.copy(self)
        part.users, part.steps = users, steps
        return part

    def whole(self) -> TrainBatches:
        """The same batches, each of which this process computes on its own."""
        part = copy.copy(self)
        part.peers = None
        return part

    def __len__(self) -> int:
        return self.steps

    def epoch(self, index: int) -> Iterator[Batch]:
        """Yield the batches of epoch ``index``, on the device; their order depends on seed and index only."""
        order = np.random.default_rng([self.seed, index]).permutation(self.users)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tpme-batches") as pool:
            following = pool.submit(self._assemble, order, 0)
            for step in range(self.steps):
                batch = following.result()
                if step + 1 < self.steps:
                    following = pool.submit(self._assemble, order, step + 1)
                yield batch.to(self.device)

    def _assemble(self, order: NDArray[np.int64], step: int) -> Batch:
        users = order[step * self.size : (step + 1) * self.size]
        batch = build_batch(self.slots[users], self.log_p, self.store, self.protocol, self.peers)
        return batch.pin() if self.device.type == "cuda" else batch
