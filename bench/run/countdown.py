"""Progress over several runs in one line: the steps done of all, and the time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

EVERY_S = 60.0
"""Time between two lines where no terminal shows the progress."""


class Countdown:
    """Runs done of all and the time left, by the mean duration of those done.

    A terminal shows one line that changes; a log gets a line a minute.

    Args:
        total: number of runs, which may grow. console: where to show them. clock: seconds, for tests.
    """

    def __init__(self, total: int, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0
        self._console, self._clock, self._status = console, clock, console.status("")
        self._began = self._printed = self._run_began = clock()

    @contextlib.contextmanager
    def shown(self) -> Iterator[Countdown]:
        """Show the line on a terminal while the runs go on."""
        with self._status if self._console.is_terminal else contextlib.nullcontext():
            yield self

    def show(self, what: str, share: float) -> None:
        """Show what the current run does and how much of that is done."""
        left_s = self.left_s()
        left = "" if left_s is None else f", about {duration_text(left_s)} left"
        line = f"run {min(self.done + 1, self.total)} of {self.total}{left}: {what}, {share:.0%}"
        if self._console.is_terminal:
            self._status.update(Text(line))
        elif self._clock() - self._printed >= EVERY_S:
            self._printed = self._clock()
            self._console.print(line, soft_wrap=True)

    def left_s(self) -> float | None:
        """Seconds that the remaining runs will take; ``None`` before the first one has ended."""
        if not self.done:
            return None
        mean_s = (self._run_began - self._began) / self.done
        waiting = self.total - self.done - 1
        return waiting * mean_s + max(0.0, mean_s - (self._clock() - self._run_began))

    def step(self) -> None:
        """Count a run as done."""
        self.done += 1
        self._run_began = self._clock()


def duration_text(seconds: float) -> str:
    """A duration for people: ``40 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
