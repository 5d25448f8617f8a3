"""Checks that all ranks begin with equal parameters: from then on, equal gradients keep them equal."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tpme.bench.train.ranks import Ranks


class UnequalRanksError(RuntimeError):
    """Ranks that should have the same parameters do not."""


def check_equal(model: nn.Module, ranks: Ranks) -> None:
    """Raise UnequalRanksError on all ranks where one has another parameter or buffer than rank 0; names the first."""
    if ranks.size == 1:
        return
    own = {name: _checksum(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    found = ranks.objects(own)
    problem = ranks.from_first(_difference(found) if found else None)
    if problem is not None:
        raise UnequalRanksError(problem)


def _difference(found: Sequence[Mapping[str, int]]) -> str | None:
    first = found[0]
    for rank, checksums in enumerate(found):
        for name in (*first, *checksums):
            if first.get(name) != checksums.get(name):
                return (
                    f"'{name}' differs between rank 0 and rank {rank} before training; every rank must build it alike"
                )
    return None


def _checksum(value: Tensor) -> int:
    """CRC-32 of the memory of a tensor, copied to the host."""
    return zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
