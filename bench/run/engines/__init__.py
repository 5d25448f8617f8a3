"""Where the cells of a matrix run: an engine takes attempts and gives back their records.

Which cells there are, which of them are finished and what becomes of their records is the launcher's
(``tpme.bench.run.launch``), whatever the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from tpme.bench.record import CellResult
from tpme.bench.run.job import Job
from tpme.bench.run.progress import Screen


class Engine(Protocol):
    """Where cells run."""

    here: bool
    """Cells run on this machine, so what it has is what they get."""
    shared: bool
    """Cells write into the run folder from other machines, also while no launcher is there."""

    def check(self, attempts: Sequence[Job]) -> None:
        """Raise UserError for attempts that cannot run there, as far as that can be known before anything is done."""

    def run(self, attempts: Sequence[Job], screen: Screen, lock: int) -> Iterator[tuple[Job, CellResult]]:
        """Run the attempts; yields each with its record as it ends, in any order.

        However an attempt ends it leaves one record in its folder, beside its log; what is left of one that was
        stopped from outside is removed.

        Args:
            attempts: one per cell, each in a folder of its own. screen: shows their progress.
            lock: the open lock file of the run folder.

        Raises:
            KeyboardInterrupt, SystemExit: SIGINT, or SIGTERM or SIGHUP, came meanwhile.
            UserError: the engine cannot run them; nothing has been started.
        """
