"""What a cell costs when several devices train it together: time, memory of each device, traffic."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal, NamedTuple

from tpme.bench.counting.devices import DeviceProfile
from tpme.bench.counting.exact import Counts
from tpme.bench.counting.meta import MetaCell
from tpme.bench.counting.rank_step import count_rank, owns_procedure
from tpme.bench.counting.roofline import expected_step_s, expected_transfer_s
from tpme.bench.errors import UserError, one_line
from tpme.bench.record import Cell, Frozen

FULL, TIGHT = 1.0, 0.9
"""Shares of a device's memory: above the first a cell does not fit, above the second it may not (fragmentation)."""
Fit = Literal["yes", "tight", "no", "unknown"]
"""Whether a planned peak fits. It covers tensors alone, and a process on a CPU takes several times as much, so there
only ``no`` is known."""


class DeviceGroup(NamedTuple):
    """The devices that train one cell together, and the nodes over which they are spread evenly."""

    devices: int
    nodes: int


class OnDevices(Frozen):
    """A cell on several devices: the share of the one with most work. Times are ``None`` where they are not known."""

    devices: int
    nodes: int
    problem: str | None = None
    """Why it trains on one device alone; then there is nothing else."""
    peak_bytes: int | None = None
    traffic_bytes: dict[str, int] = {}
    """That a device sends in a step, by what it is; it receives as much."""
    compute_s: float | None = None
    """Of a step, without collectives."""
    collectives_s: float | None = None
    """Of a step, nothing of it overlapped with the computation: an upper bound."""
    step_s: float | None = None
    speed_up: float | None = None
    """How many times as fast as one device."""
    fits: Fit | None = None


class AllCells(Frozen):
    """The training of all cells of a matrix on the same devices, every epoch of it; nothing else is included."""

    cells: int
    device_s: float
    """Every cell on one device, added up."""
    side_by_side_s: float
    """The same on all devices, a cell on each; no less than the longest cell."""
    one_by_one_s: float
    """Every cell on all devices, save those that train on one."""


def is_gpu(device: DeviceProfile) -> bool:
    """Whether a profile is of a GPU: its matrix library takes a workspace from torch's allocator."""
    return device.workspace_bytes > 0


def fit(peak_bytes: int, device: DeviceProfile) -> Fit:
    """Whether a planned peak fits into a device."""
    share = peak_bytes / device.memory_bytes
    if share > FULL:
        return "no"
    return "unknown" if not is_gpu(device) else "tight" if share > TIGHT else "yes"


def check_group(group: DeviceGroup, cell: Cell, users: int) -> None:
    """Raise UserError where a cell cannot be planned on ``group``.

    The devices do not divide evenly over the nodes, or a step has fewer users than there are devices.

    Args:
        group: the devices. cell: its settings. users: in its data set.
    """
    devices, nodes = group
    for option, number in (("--devices", devices), ("--nodes", nodes)):
        if number < 1:
            raise UserError(f"{option} {number}: at least one is needed")
    if devices % nodes:
        raise UserError(
            f"--nodes {nodes}: the devices of a cell ({devices}) do not divide evenly over them; --devices is their "
            f"number on all nodes, such as {-(-devices // nodes) * nodes}"
        )
    batch = min(cell.training.users_per_batch, users)
    if batch < devices:
        raise UserError(
            f"method '{cell.method}' on data set '{cell.dataset}': a step has {batch} users, too few for {devices} "
            "devices; raise training.users_per_batch or plan fewer devices"
        )


def plan_together(
    meta: MetaCell, counts: Counts, group: DeviceGroup, device: DeviceProfile | None, alone_s: float | None
) -> OnDevices:
    """A cell on several devices.

    Args:
        meta: the cell. counts: of its step on one device. group: the devices, two or more. device: their profile.
        alone_s: expected time of a step on one of them.
    """
    devices, nodes = group
    if not counts.trainable:
        return OnDevices(devices=devices, nodes=nodes, problem="trains nothing")
    if owns_procedure(meta.method):
        return OnDevices(devices=devices, nodes=nodes, problem="controls its whole procedure, which runs on one device")
    memory_bytes, workspace_bytes = (device.memory_bytes, device.workspace_bytes) if device else (None, 0)
    try:
        share = count_rank(meta, counts, devices, memory_bytes=memory_bytes, workspace_bytes=workspace_bytes)
    except Exception as error:  # a method whose step needs all items of the batch
        return OnDevices(devices=devices, nodes=nodes, problem=f"its share could not be counted: {one_line(error)}")
    traffic = {part: size for part, size in asdict(share.traffic).items() if part != "rounds"}
    plan = OnDevices(devices=devices, nodes=nodes, peak_bytes=share.peak_bytes, traffic_bytes=traffic)
    if device is None or alone_s is None:
        return plan
    compute_s = expected_step_s(share.step, share.updated, device)
    collectives_s = expected_transfer_s(share.traffic, device, nodes)
    step_s = None if collectives_s is None else compute_s + collectives_s
    return plan.model_copy(
        update={
            "compute_s": compute_s,
            "collectives_s": collectives_s,
            "step_s": step_s,
            "speed_up": alone_s / step_s if step_s else None,
            "fits": fit(share.peak_bytes, device),
        }
    )
