"""Bytes that one of the N ranks of a cell sends in a training step: a formula, without any communication.

Every collective runs as a ring, which sends the fewest bytes possible (Patarasuk and Yuan, Bandwidth optimal all-reduce
algorithms for clusters of workstations, J. Parallel Distrib. Comput. 69, 2009): an all-gather or a reduce-scatter of S
bytes in all sends (N - 1) / N x S from each rank in N - 1 rounds, an all-reduce is one of each. A rank receives as much
as it sends. Single numbers (the loss, the scaler's flag) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BYTES = 4
BUCKET_BYTES = 25 << 20
"""Gradients are reduced in flat buffers of about this size, as torch's DistributedDataParallel does by default."""


@dataclass(frozen=True)
class Sharded:
    """Encoders spread over the ranks (FSDP2), in bytes of whole tensors in a pass.

    forward_bytes: weights gathered in the forward pass. backward_bytes: those gathered again in the backward pass,
    because they were let go in between. gradient_bytes: gradients that are scattered. groups: modules that are gathered
    at a time (the layers, and the rest of each encoder).
    """

    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int
    groups: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one training step, by what they are; all 0 on one device.

    item_vectors: all-gather. vector_gradients: their gradients, reduce-scatter. gradients: of the trained parameters
    that every rank holds, all-reduce. sharded_weights: all-gathers of sharded encoders, forward and backward.
    sharded_gradients: their reduce-scatter. rounds: of all rings, in each of which a rank waits for its neighbour.
    """

    item_vectors: int
    vector_gradients: int
    gradients: int
    sharded_weights: int
    sharded_gradients: int
    rounds: int

    @property
    def total(self) -> int:
        """All bytes that a rank sends in a step."""
        parts = (self.item_vectors, self.vector_gradients, self.gradients, self.sharded_weights, self.sharded_gradients)
        return sum(parts)


def all_gather(size: int, ranks: int) -> int:
    """Bytes that each of ``ranks`` sends to gather ``size`` bytes in all, rounded up."""
    return -(-(ranks - 1) * size // ranks)


def reduce_scatter(size: int, ranks: int) -> int:
    """Bytes that each of ``ranks`` sends to add up ``size`` bytes and keep its part, rounded up."""
    return all_gather(size, ranks)


def all_reduce(size: int, ranks: int) -> int:
    """Bytes that each of ``ranks`` sends to add up ``size`` bytes and hold all of the sum, rounded up."""
    return reduce_scatter(size, ranks) + all_gather(size, ranks)


def vector_bytes(items: int, width: int, ranks: int, element_bytes: int = FLOAT_BYTES) -> int:
    """Bytes of the gathered vectors of ``items`` of ``width``, dealt out evenly, every share as long as the longest."""
    return ranks * -(-items // ranks) * width * element_bytes


def step_traffic(
    ranks: int,
    *,
    items: int,
    width: int,
    gradient_bytes: int,
    sharded: Sharded | None = None,
    passes: int = 1,
    element_bytes: int = FLOAT_BYTES,
) -> Traffic:
    """The traffic of one training step.

    Args:
        ranks: N. items: encoded in the whole job, n (slots under protocol ``paper``). width: of an item vector, d.
        gradient_bytes: of the trained parameters that every rank holds whole. sharded: encoders that are spread over
            the ranks. passes: forward passes of a step. element_bytes: of an element of an item vector.
    """
    if ranks == 1:
        return Traffic(0, 0, 0, 0, 0, 0)
    vectors = vector_bytes(items, width, ranks, element_bytes)
    spread = sharded or Sharded(0, 0, 0, 0)
    buckets = -(-gradient_bytes // BUCKET_BYTES)
    transfers = passes * 2 + 2 * buckets + passes * _transfers(spread)
    return Traffic(
        item_vectors=passes * all_gather(vectors, ranks),
        vector_gradients=passes * reduce_scatter(vectors, ranks),
        gradients=all_reduce(gradient_bytes, ranks),
        sharded_weights=passes * all_gather(spread.forward_bytes + spread.backward_bytes, ranks),
        sharded_gradients=passes * reduce_scatter(spread.gradient_bytes, ranks),
        rounds=transfers * (ranks - 1),
    )


def _transfers(spread: Sharded) -> int:
    """How often sharded tensors are gathered or scattered in a pass."""
    return spread.groups * sum(
        size > 0 for size in (spread.forward_bytes, spread.backward_bytes, spread.gradient_bytes)
    )
