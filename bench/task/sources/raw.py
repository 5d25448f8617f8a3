"""What every source delivers before it is prepared: titles, pictures and users' histories, by item name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tpme.bench.record import Modality  # its models take longer to define than a worker to start

Picture = Callable[[int], NDArray[np.uint8]]
"""``picture(size)``: one decoded item image, uint8 (3, size, size), RGB. Called in worker processes: picklable.

Raises UserError, naming the file, where the image cannot be read.
"""


@dataclass(frozen=True)
class RawData:
    """One data set as a source read it, checked but not yet filtered, split or written.

    ``titles`` and ``pictures`` are parallel to ``items``, or ``None`` where the modality is absent.
    ``histories[u]`` are positions in ``items``, oldest first, of ``users[u]``.
    """

    name: str
    items: list[str]
    titles: list[str] | None
    pictures: list[Picture] | None
    users: list[str]
    histories: list[NDArray[np.int32]]
    skipped: dict[str, int]
    """What ``--skip-bad`` left out, by reason."""
    source: str = ""
    """Kind and place it was read from, for people; empty where the name says it all."""
    synthetic: dict[str, Any] | None = None
    """The settings given to the built-in catalogue; ``None`` for other data."""

    def only(self, modalities: tuple[Modality, ...]) -> RawData:
        """The same with these modalities alone."""
        titles = self.titles if "text" in modalities else None
        return replace(self, titles=titles, pictures=self.pictures if "image" in modalities else None)
