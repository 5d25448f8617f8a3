"""The clock of every measurement: wall time, read after the device has finished all queued work."""

from __future__ import annotations

import time


def is_cuda(device: object) -> bool:
    """Whether ``device`` (a ``torch.device`` or its name, ``"cuda:1"``) is a CUDA device; does not import torch."""
    return str(device).partition(":")[0] == "cuda"


def sync(device: object) -> None:
    """Wait until ``device`` has run everything queued on it; a no-op on a CPU.

    Raises:
        RuntimeError: an error of work queued earlier (an illegal access, a lost device).
    """
    if is_cuda(device):
        import torch

        torch.cuda.synchronize(str(device))


def now(device: object = "cpu") -> float:
    """``time.perf_counter`` in seconds, once ``device`` is idle. All processes of a machine share this clock."""
    sync(device)
    return time.perf_counter()
