"""Measures how long the threads of a run waited for a CPU core.

Wall times are not comparable where other programs, or too many threads of the run itself, compete for the cores: two
threads that synchronise at every operator are slowed several times by one busy neighbour. For each thread Linux counts
the time it was ready to run but not running.
"""

from __future__ import annotations

import os

from tpme.bench.measure.host import read_small

SOURCE = "longest wait of one thread for a core (schedstat), as a share of training time"
CROWDED = 0.05
"""Runs that waited for more than this share of their training time are flagged."""


class CoreWait:
    """Time the threads of this process waited for a core, window by window."""

    def __init__(self) -> None:
        self.start_window()

    def start_window(self) -> None:
        """Start a window."""
        self._before = _waits()

    def waited_s(self) -> float | None:
        """The longest wait of any thread since ``start_window`` (seconds); None where the system does not count it."""
        after = _waits()
        if not after:
            return None
        return max(now - self._before.get(thread, 0) for thread, now in after.items()) / 1e9


def _waits() -> dict[str, int]:
    """Thread -> nanoseconds waited since its start."""
    waits = {}
    try:
        threads = os.scandir("/proc/self/task")
    except OSError:
        return {}
    with threads:
        for thread in threads:
            fields = read_small(f"{thread.path}/schedstat").split()
            if len(fields) > 1:
                waits[thread.name] = int(fields[1])
    return waits
