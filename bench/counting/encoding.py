"""FLOPs of encoding items, counted while a real model encodes real items: skipped work is not counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpme.bench.counting.modes import Tracker
from tpme.bench.task.items import Items


@torch.no_grad()
def item_flops(encode: Callable[[Items], Tensor], items: Items) -> tuple[float, tuple[str, ...]]:
    """FLOPs an item of one pass over ``items``: matrix products and convolutions, 1 multiply-add = 2 FLOPs.

    Attention runs as torch's math and compiled parts run eagerly, because fused kernels hide their FLOPs.

    Args:
        encode: maps items to their vectors, in eval mode. items: n items, on the device of the model.

    Returns:
        The FLOPs, and the operators that may compute something but have no FLOP formula; where there are any, the
        FLOPs are a lower bound.
    """
    # Under a dispatch mode Dynamo would stop compiling the functions it meets. If it is not imported yet, nothing is
    # compiled, and importing it would take a second.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer of nn.TransformerEncoder
    tracker = Tracker()
    try:
        with sdpa_kernel(SDPBackend.MATH), eager, tracker:
            encode(items)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return tracker.flops / len(items), tuple(sorted(tracker.uncounted))
