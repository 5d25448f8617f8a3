"""Whether the measured threads got the cores they asked for.

A wall time is worth little where other programs, or too many threads of its own, keep the run off the cores: two
threads that wait for each other at every operator turn one busy neighbour into a factor, not a percentage. The Linux
scheduler counts for each thread how long it was ready to run but did not.
"""

from __future__ import annotations

import os

from tpme.bench.measure.host import read_small

SOURCE = "longest wait of one thread for a core (schedstat), as a share of training time"
CROWDED = 0.05
"""Share of the training time from which on a run is flagged."""


class CoreWait:
    """How long the threads of this process waited for a core, window by window."""

    def __init__(self) -> None:
        self.start_window()

    def start_window(self) -> None:
        """Start a window."""
        self._before = _waits()

    def waited_s(self) -> float | None:
        """The longest any thread waited since ``start_window`` (seconds); None where the system does not count it."""
        after = _waits()
        if not after:
            return None
        return max(now - self._before.get(thread, 0) for thread, now in after.items()) / 1e9


def _waits() -> dict[str, int]:
    """Thread -> nanoseconds waited since it began."""
    found = {}
    try:
        threads = os.scandir("/proc/self/task")
    except OSError:
        return {}
    with threads:
        for thread in threads:
            fields = read_small(f"{thread.path}/schedstat").split()
            if len(fields) > 1:
                found[thread.name] = int(fields[1])
    return found
