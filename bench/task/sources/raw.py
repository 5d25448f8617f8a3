"""The data that every source delivers: titles, pictures and users' histories, by item name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tpme.bench.record import Modality  # defining its models takes longer than starting a worker

Picture = Callable[[int], NDArray[np.uint8]]
"""``picture(size)``: one decoded item image, uint8 (3, size, size), RGB. Picklable, for worker processes.

Raises UserError, naming the file, if the image cannot be read.
"""


@dataclass(frozen=True)
class RawData:
    """A data set as read from its source: checked, but not filtered, split or written.

    ``titles`` and ``pictures`` are parallel to ``items``, or ``None`` without that modality. ``histories[u]``: the
    items of ``users[u]``, oldest first, as positions in ``items``.
    """

    name: str
    items: list[str]
    titles: list[str] | None
    pictures: list[Picture] | None
    users: list[str]
    histories: list[NDArray[np.int32]]
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
