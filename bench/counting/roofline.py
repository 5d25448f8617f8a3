"""The expected time of a training step: the roofline of every operator, bounded by the host that starts them."""

from __future__ import annotations

import torch

from tpme.bench.counting.devices import DeviceProfile
from tpme.bench.counting.exact import Step
from tpme.bench.counting.traffic import Traffic
from tpme.bench.record import Precision

ADAM_BYTES = 28
"""Traffic of an update per trained parameter: weight and two moments read and written, gradient read, 4 bytes each."""
_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def expected_step_s(step: Step, updated: float, device: DeviceProfile) -> float:
    """Seconds of a step at the profile's efficiency, data loading hidden behind it.

    Args:
        step: with the attention of the device. updated: parameters that the optimiser updates. device: its profile.
    """
    bandwidth = device.memory_bytes_per_s * device.efficiency
    busy_s = ADAM_BYTES * updated / bandwidth
    for (dtype, flops, moved), times in step.work.items():
        rate = device.rate(_PRECISIONS.get(dtype, "fp32")) * device.efficiency
        busy_s += times * max(flops / rate, moved / bandwidth)
    return max(busy_s, sum(step.work.values()) * device.operator_s)


def expected_transfer_s(traffic: Traffic, device: DeviceProfile, nodes: int) -> float | None:
    """Seconds in the collectives of a step, on the slowest link of the ring; ``None`` where its rate is not known.

    Nothing is overlapped with the computation, so this is an upper bound at the profile's efficiency.

    Args:
        traffic: of a rank. device: its profile. nodes: over which the ranks are spread.
    """
    rates, latencies = [device.link_bytes_per_s], [device.link_latency_s]
    if nodes > 1:
        rates.append(device.node_link_bytes_per_s)
        latencies.append(device.node_link_latency_s)
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates):
        return None
    return traffic.total / (min(known) * device.efficiency) + traffic.rounds * max(latencies)
