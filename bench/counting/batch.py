"""The canonical batch: the input of a training step that is counted instead of measured.

It depends on the data set and the batch size alone, never on a seed: its user lengths are quantiles of the data set's
lengths, and it has as many distinct items as a random batch has on average. Without a prepared data set both are those
of Amazon Scientific, and the batch says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpme.bench.task.dataset import Dataset
from tpme.bench.train.build import DataSize

SCIENTIFIC_USERS, SCIENTIFIC_ITEMS = 12_076, 20_314
SCIENTIFIC_LENGTHS = {3: 4892, 4: 2652, 5: 1465, 6: 895, 7: 609, 8: 356, 9: 300, 10: 208, 11: 699}
"""Amazon Scientific as IISAN prepares it: number of users by number of training slots."""
SCIENTIFIC_DISTINCT = {1: 0.960, 8: 0.952, 16: 0.943, 32: 0.929, 64: 0.905, 128: 0.869, 256: 0.815, 512: 0.740}
"""Expected distinct items per filled slot of a random batch of Amazon Scientific, by number of users."""
MAX_SEQ_LEN = 10


@dataclass(frozen=True)
class DataShape(DataSize):
    """What a data set's size and lengths add to the cost of a step; never its content.

    lengths: filled training slots of every user (at most L + 1), sorted. occurrences: of every item that trains, the
    number of users with it in their training slots; ``None`` where that is assumed. source: of all this, in words.
    """

    lengths: NDArray[np.int64]
    occurrences: NDArray[np.int64] | None
    source: str

    @classmethod
    def of(cls, dataset: Dataset) -> DataShape:
        """The shape of a prepared data set."""
        lengths, seen_by = [], np.zeros(dataset.manifest.items + 1, np.int64)
        for part in dataset.train_parts():
            slots = np.sort(part, axis=1)
            first_seen = np.diff(slots, axis=1, prepend=0) > 0
            seen_by += np.bincount(slots[first_seen], minlength=len(seen_by))
            lengths.append((slots > 0).sum(axis=1))
        return cls(
            **vars(DataSize.of(dataset)),
            lengths=np.sort(np.concatenate(lengths)),
            occurrences=seen_by[seen_by > 0],
            source="the prepared data set",
        )

    @classmethod
    def assumed(cls, users: int | None = None, items: int | None = None) -> DataShape:
        """The shape of a data set that is not prepared: lengths and repeats of Amazon Scientific, sizes as given."""
        size = items or SCIENTIFIC_ITEMS
        return cls(
            users=users or SCIENTIFIC_USERS,
            items=size,
            max_seq_len=MAX_SEQ_LEN,
            lengths=np.repeat(list(SCIENTIFIC_LENGTHS), list(SCIENTIFIC_LENGTHS.values())),
            occurrences=None,
            popularity=np.zeros(size + 1),
            source="assumed, with the user lengths and repeats of Amazon Scientific",
        )

    def describe(self) -> str:
        """Its size and the source of that, in words."""
        return f"{self.users:,} users, {self.items:,} items; {self.source}"

    def batch_lengths(self, users: int) -> NDArray[np.int64]:
        """Filled slots of each of ``users`` canonical users: quantiles of all lengths, which keeps their mean."""
        middle = (np.arange(users) + 0.5) / users
        return self.lengths[(middle * len(self.lengths)).astype(np.int64)]

    def distinct_items(self, users: int) -> int:
        """Average number of distinct items in a random batch of ``users`` users, rounded."""
        slots = int(self.batch_lengths(users).sum())
        if self.occurrences is None:
            known = np.log2(list(SCIENTIFIC_DISTINCT))
            expected = slots * float(np.interp(math.log2(users), known, list(SCIENTIFIC_DISTINCT.values())))
        else:
            # A batch of B of the U users misses an item that k users have with probability C(U-k, B) / C(U, B). Only
            # products, no logarithms: these round alike on every machine.
            times, number = np.unique(self.occurrences, return_counts=True)
            missed = np.ones(len(times))
            for drawn in range(users):
                missed *= np.maximum(self.users - times - drawn, 0) / (self.users - drawn)
            expected = float((number * (1 - missed)).sum())
        return max(1, min(round(expected), slots, self.items))


def canonical_slots(data: DataShape, users_per_batch: int) -> NDArray[np.int32]:
    """Item ids of the canonical batch, (B, L + 1), left-padded with 0; its n distinct items are numbered 1 to n."""
    users = min(users_per_batch, data.users)
    lengths = data.batch_lengths(users)
    filled = np.arange(data.max_seq_len + 1) >= data.max_seq_len + 1 - lengths[:, None]
    slots = np.zeros(filled.shape, dtype=np.int32)
    slots[filled] = np.arange(int(lengths.sum())) % data.distinct_items(users) + 1
    return slots
