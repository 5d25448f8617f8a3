"""Step times without making the host wait: CUDA events on a GPU, the monotonic clock on a CPU."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class StepTimer:
    """Laps of one epoch. A lap begins where the one before ends, so waiting for data is part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[float] = []
        self.events: list[torch.cuda.Event] = []

    def lap(self) -> None:
        """End a lap and begin the next; the first call begins the first."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.events.append(event)
        else:
            self.marks.append(time.perf_counter())

    start = lap

    def seconds(self) -> list[float]:
        """Seconds of each lap. On a GPU, synchronise first."""
        if self.cuda:
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.events)]
        return [b - a for a, b in pairwise(self.marks)]
