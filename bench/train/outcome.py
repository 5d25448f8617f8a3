"""Results of training, filled epoch by epoch, and which of them a record's T, M and quality are taken from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tpme.bench.record import Epoch, earlier_epochs

WARMUP_EPOCHS = 1
"""Leading epochs of a stage that do not count towards the epoch time, where it has at least three."""


@dataclass
class Outcome:
    """What training has left so far, so a failure keeps the epochs before it.

    ``best_epoch``, ``best_recall`` and ``test_ranks`` are those of the stage that trained last.
    """

    epochs: list[Epoch] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    step_epoch: list[int] = field(default_factory=list)
    best_epoch: int | None = None
    best_recall: float | None = None
    test_ranks: NDArray[np.int32] | None = None
    trainable_max: int = 0
    """The most parameters that trained at one time."""
    first_phase: int = 0
    """Number of phases that were recorded before the stage that trained last."""

    def begin_stage(self, name: str, phases: int) -> None:
        """Begin the stage ``name`` after ``phases`` phases; a new stage forgets the best epoch so far."""
        if not self.epochs or self.epochs[-1].stage != name:
            self.best_epoch = self.best_recall = self.test_ranks = None
            self.first_phase = phases

    @property
    def earlier_epochs(self) -> int:
        """Number of epochs before those of the stage that trained last."""
        return earlier_epochs(self.epochs)

    @property
    def warmup_epochs(self) -> int:
        """Leading epochs that do not count towards the epoch time: of earlier stages, and the last stage's warm-up."""
        earlier = self.earlier_epochs
        return earlier + (WARMUP_EPOCHS if len(self.epochs) - earlier > 2 * WARMUP_EPOCHS else 0)
