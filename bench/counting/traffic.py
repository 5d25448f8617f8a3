"""Bytes that a rank sends in a training step of one cell on several devices, by formula.

In a ring, as NCCL and gloo send large tensors, a rank sends (N - 1) / N of what is gathered or scattered in the end,
and twice that for a sum that all ranks get.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTraffic:
    """What one rank sends in a step, in bytes.

    gather: item vectors, in the forward pass. scatter: their gradients, in the backward pass. gradients: those of
    parameters that each rank has whole. shards: weights of sharded encoders, gathered for both passes, and their
    gradients, scattered.
    """

    gather: float
    scatter: float
    gradients: float
    shards: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.gather + self.scatter + self.gradients + self.shards


def step_traffic(
    items: int,
    dim: int,
    parameters: int,
    devices: int,
    *,
    tensors: int = 0,
    passes: int = 1,
    vector_bytes: int = 4,
    parameter_bytes: int = 4,
    sharded: int = 0,
    sharded_trained: int = 0,
) -> StepTraffic:
    """What one of N ``devices`` sends in a step.

    With m = ceil(n / N) vectors a rank: ``(N-1) m d b`` for the vectors, as much for their gradients, and
    ``2 (N-1)/N (P + T) b`` for the gradients of P trained numbers in T tensors, with one number a tensor that says
    whether there is a gradient; ``(N-1)/N b (2 W + P_s)`` for W sharded numbers, of which P_s train.

    Args:
        items: n, distinct items of a batch (``paper``: slots). dim: d. parameters: P, those that each rank has whole.
        tensors: T. passes: of a step. vector_bytes, parameter_bytes: b, of a vector's and a parameter's numbers.
        sharded, sharded_trained: W and P_s.
    """
    others = devices - 1
    vectors = float(passes * others * -(-items // devices) * dim * vector_bytes)
    share = others / devices * parameter_bytes
    return StepTraffic(
        gather=vectors,
        scatter=vectors,
        gradients=2 * share * (parameters + tensors),
        shards=share * (2 * sharded + sharded_trained),
    )
