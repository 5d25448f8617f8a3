"""The clock of every measurement: wall time, read only after the device has finished what it was given."""

from __future__ import annotations

import time


def is_cuda(device: object) -> bool:
    """Whether ``device`` (a ``torch.device`` or its text, ``"cuda:1"``) is a CUDA device; imports nothing."""
    return str(device).partition(":")[0] == "cuda"


def sync(device: object) -> None:
    """Wait until ``device`` has run everything queued on it; a CPU has nothing queued.

    Raises:
        RuntimeError: what the device reports for work queued earlier (an illegal access, a lost device).
    """
    if is_cuda(device):
        import torch

        torch.cuda.synchronize(str(device))


def now(device: object = "cpu") -> float:
    """Seconds of ``time.perf_counter`` with ``device`` idle. The clock is one for all processes of the machine."""
    sync(device)
    return time.perf_counter()
