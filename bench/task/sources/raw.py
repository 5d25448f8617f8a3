"""The data that every source delivers: titles, pictures and users' histories, by item name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tpme.bench.record import Modality  # defining its models takes longer than starting a worker

Picture = Callable[[int], NDArray[np.uint8]]
"""``picture(size)``: one decoded item image, uint8 (3, size, size), RGB. Picklable, for worker processes.

Raises UserError, naming the file, if the image cannot be read.
"""


Value = TypeVar("Value")


class Computed(Sequence[Value]):
    """A sequence of ``count`` values of which none is stored: value i is ``make(i)``."""

    def __init__(self, count: int, make: Callable[[int], Value]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        return self._make(range(self._count)[index])


class Histories(Computed[NDArray[np.int32]]):
    """Histories of all users in one array, ten million of which take megabytes and not gigabytes.

    items: int32, flat, by user. offsets: int64 (users + 1,): user u owns ``items[offsets[u]:offsets[u + 1]]``.
    """

    def __init__(self, items: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
        super().__init__(len(offsets) - 1, lambda user: items[offsets[user] : offsets[user + 1]])
        self.items, self.offsets = items, offsets

    @classmethod
    def of(cls, histories: Sequence[NDArray[np.int32]]) -> Histories:
        """The same histories in one array."""
        if isinstance(histories, Histories):
            return histories
        lengths = np.fromiter(map(len, histories), np.int64, len(histories))
        return cls(np.concatenate([np.zeros(0, np.int32), *histories]), offsets_of(lengths))


def offsets_of(lengths: NDArray[np.integer[Any] | np.bool_]) -> NDArray[np.int64]:
    """Where each of n parts of these lengths begins in one array, and where the last ends: (n + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


@dataclass(frozen=True)
class RawData:
    """A data set as read from its source: checked, but not filtered, split or written.

    ``titles`` and ``pictures`` are parallel to ``items``, or ``None`` without that modality. ``histories[u]``: the
    items of ``users[u]``, oldest first, as positions in ``items``.
    """

    name: str
    items: Sequence[str]
    titles: Sequence[str] | None
    pictures: Sequence[Picture] | None
    users: Sequence[str]
    histories: Sequence[NDArray[np.int32]]
    skipped: dict[str, int]
    """Counts of what ``--skip-bad`` left out, by reason."""
    source: str = ""
    """Kind and location of the source, for people; if empty, the name is used."""
    synthetic: dict[str, Any] | None = None
    """Settings given to the built-in catalogue; ``None`` for other data."""

    def only(self, modalities: tuple[Modality, ...]) -> RawData:
        """A copy restricted to these modalities."""
        titles = self.titles if "text" in modalities else None
        return replace(self, titles=titles, pictures=self.pictures if "image" in modalities else None)
