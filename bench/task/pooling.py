"""One vector of many tokens: the first, the mean or the last of those that a mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from tpme.bench.record import Pool


def pool_tokens(states: Tensor, mask: Tensor | None, pool: Pool) -> Tensor:
    """Pool hidden states over their tokens.

    ``first`` is token 0, which is never masked; ``mean`` the sum of the kept tokens over their number, as in
    sentence-transformers; ``last`` the kept token at the highest position. No value is read on the host.

    Args:
        states: (n, T, width). mask: (n, T) bool, true for the tokens to keep, at least one an item; ``None``: all. For
            ``mean`` it may be float: the weight of every token.

    Returns:
        (n, width), in the type of ``states``.
    """
    if pool == "first":
        return states[:, 0]
    if mask is None:
        return states.mean(1) if pool == "mean" else states[:, -1]
    if pool == "mean":
        kept = mask[..., None].to(states.dtype)
        return (states * kept).sum(1) / kept.sum(1)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
