"""A batch that several devices work on together, each in a process of its own, a rank.

The items of the whole batch are dealt out, and each is encoded by one rank. Item vectors are gathered, so that every
rank scores its share of the users against the candidates of the whole batch. In the backward pass the gradients of an
item's vector are summed over the ranks where that item was encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Peers(Protocol):
    """The ranks that work on a batch, and their collectives; ``bench/train/ranks.py`` implements it."""

    rank: int
    size: int
    common: torch.Generator | None
    """While each rank draws its own numbers: the generator that draws the same on all."""

    def all_gather(self, own: Tensor) -> Tensor:
        """The equally shaped tensors (m, ...) of all ranks, (N m, ...) in their order, without a graph."""

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """This rank's part (m, ...) of the sum over the ranks of tensors (N m, ...)."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks, without a graph, as a new tensor."""


@dataclass(frozen=True)
class Share:
    """What this rank does of a batch with n items and V positions.

    rows: (k,) int64, the items that it encodes. place: (n,) int64, where each item is among the vectors of all ranks,
    m of each. most: m, the largest k of a rank. positions: V / N, the divisor of a sum over this rank's positions:
    gradients are averaged over the ranks.
    """

    peers: Peers
    rows: Tensor
    place: Tensor
    most: int
    positions: float

    @classmethod
    def of(cls, peers: Peers, owner: NDArray[np.int64], positions: int) -> Share:
        """The share of this rank where item i is encoded by rank ``owner[i]``, (n,)."""
        counts = np.bincount(owner, minlength=peers.size)
        order = np.argsort(owner, kind="stable")
        within = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner[order]]
        place = np.empty(len(owner), dtype=np.int64)
        most = int(counts.max())
        place[order] = owner[order] * most + within
        rows = np.flatnonzero(owner == peers.rank)
        return cls(peers, torch.from_numpy(rows), torch.from_numpy(place), most, positions / peers.size)

    def gather(self, own: Tensor) -> Tensor:
        """The vectors of all items, (n, d), from those of this rank, (k, d); differentiable."""
        vectors: Tensor = _Gathered.apply(own, self)  # type: ignore[no-untyped-call]
        return vectors


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, share: Share) -> Tensor:
        ctx.share, ctx.own = share, len(own)
        return gathered(share.peers, own, share.most).index_select(0, share.place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        share: Share = ctx.share
        whole = gradient.new_zeros(share.peers.size * share.most, *gradient.shape[1:])
        whole.index_copy_(0, share.place, gradient)
        return share.peers.reduce_scatter(whole)[: ctx.own], None


def gathered(peers: Peers, own: Tensor, most: int) -> Tensor:
    """The rows of all ranks, (N m, ...), without a graph; ``own`` (k, ...) is padded to m = ``most`` rows of zeros."""
    if len(own) < most:
        own = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
    return peers.all_gather(own.contiguous())


def sharing(peers: Peers | None, count: int) -> Peers | None:
    """The ranks that share ``count`` rows; ``None``, each computes all of them: one rank, or fewer rows than ranks."""
    return peers if peers is not None and 1 < peers.size <= count else None


def dealt_rows(peers: Peers | None, count: int) -> slice:
    """Which of ``count`` rows belong to this rank: every N-th; without ``peers``, all."""
    return slice(None) if peers is None else slice(peers.rank, count, peers.size)


def undealt(peers: Peers | None, own: Tensor, count: int) -> Tensor:
    """The rows of all ranks in their order, (count, ...), where each has those of ``dealt_rows``; without a graph."""
    if peers is None:
        return own
    most = -(-count // peers.size)
    parts = gathered(peers, own, most).view(peers.size, most, *own.shape[1:])
    return parts.transpose(0, 1).flatten(0, 1)[:count]


class WholeBatch:
    """What a method may do over the items of the whole batch, in whichever rank they are encoded.

    A model and its views share one. On one device, and where every rank encodes the whole batch, all of it is local.
    """

    def __init__(self) -> None:
        self.peers: Peers | None = None
        self.share: Share | None = None
        """Of the batch in the running step; ``None``: this process encodes all of its items."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the items of the whole batch, from the sum over those encoded here.

        Differentiable. Of a mean, sum numerator and denominator.
        """
        if self.share is None:
            return values
        summed: Tensor = _Summed.apply(values, self.share.peers)  # type: ignore[no-untyped-call]
        return summed

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the ranks of what each has counted, in evaluations too; call it on all ranks (``report``)."""
        return counts if self.peers is None else self.peers.sum(counts)

    def rand_like(self, values: Tensor) -> Tensor:
        """Uniform random numbers for the items encoded here, (k, ...); they do not depend on the number of ranks."""
        if self.share is None and self.generator is None:
            return torch.rand_like(values)
        count = len(values) if self.share is None else len(self.share.place)
        drawn = torch.rand(count, *values.shape[1:], generator=self.generator, dtype=values.dtype, device=values.device)
        return drawn if self.share is None else drawn.index_select(0, self.share.rows)

    @property
    def generator(self) -> torch.Generator | None:
        """What draws the same on all ranks within a step; ``None``: the generator of the device."""
        return None if self.peers is None else self.peers.common

    def drawn_again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a layer's forward pass and of its repetition in the backward pass, which draws the same again."""
        assert self.generator is not None
        return nullcontext(), _from_state(self.generator, self.generator.get_state())


@contextmanager
def _from_state(generator: torch.Generator, state: Tensor) -> Iterator[None]:
    """Let a generator draw from an earlier state within the block."""
    after = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(after)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers.sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each rank differentiates a loss of its own, and all of them contain this sum.
        return ctx.peers.sum(gradient), None
