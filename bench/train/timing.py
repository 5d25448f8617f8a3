"""Step times without making the host wait: CUDA events on a GPU, the monotonic clock on a CPU."""

from __future__ import annotations

import time

import torch


class StepTimer:
    """Laps of one epoch, each from the end of the step before it, so that waiting for data is part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[float] = []
        self.events: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Begin the first lap."""
        self._mark()

    def lap(self) -> None:
        """End a lap and begin the next."""
        self._mark()

    def seconds(self) -> list[float]:
        """Seconds of each lap. On a GPU call it after a synchronisation."""
        if self.cuda:
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.events, self.events[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]

    def _mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.events.append(event)
        else:
            self.marks.append(time.perf_counter())
