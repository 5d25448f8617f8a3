"""Torch's own statistics of device memory. Torch is imported for CUDA devices only."""

from __future__ import annotations

from tpme.bench.measure.clock import is_cuda
from tpme.bench.record import Reading

NO_CUDA = "no CUDA device"


def reset_peaks(device: object) -> None:
    """Reset the peaks to the memory held now."""
    if is_cuda(device):
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]  # the statistics do not exist before
        torch.cuda.reset_peak_memory_stats(str(device))


def peaks(device: object) -> tuple[Reading, Reading]:
    """Peaks of allocated and of reserved memory since the last reset (bytes)."""
    names = ("torch allocated peak", "torch reserved peak")
    if not is_cuda(device):
        return Reading.missing(names[0], NO_CUDA), Reading.missing(names[1], NO_CUDA)
    import torch

    return (
        Reading(value=torch.cuda.max_memory_allocated(str(device)), source=names[0]),
        Reading(value=torch.cuda.max_memory_reserved(str(device)), source=names[1]),
    )


def reserved_bytes(device: object) -> int:
    """Memory the caching allocator holds now (bytes); 0 on a CPU."""
    if not is_cuda(device):
        return 0
    import torch

    return int(torch.cuda.memory_reserved(str(device)))


def release_cached(device: object) -> None:
    """Return unused blocks of the caching allocator to the device."""
    if is_cuda(device):
        import torch

        torch.cuda.empty_cache()
