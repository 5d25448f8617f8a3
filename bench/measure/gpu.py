"""NVML readings of one window of work on a GPU; doubtful values are marked invalid, with the reason.

NVML is read at both ends of the window and, between them, by the sampler. Each value is checked for plausibility: a
process or device that holds less than torch reserved was not read at its peak, or is another process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tpme.bench.measure.host import descendants
from tpme.bench.measure.nvml import Device, Idle, NvmlError
from tpme.bench.measure.sampler import Column
from tpme.bench.record import Flag, GpuFacts, Reading

MIN_ENERGY_S = 0.1
"""The energy counter is updated every 20 to 100 ms; in a shorter window that step would dominate."""
CONTEXT_BYTES = 100 << 20
"""Less than any CUDA context takes: an idle device that uses more is in use by another process."""
_MIB = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class GpuReadings:
    """Readings of one window: peak device memory over the idle baseline, peak memory of this process, energy."""

    device_bytes: Reading
    process_bytes: Reading
    energy_j: Reading
    facts: GpuFacts | None


def unreadable(reason: str) -> GpuReadings:
    """Missing readings, for a device that NVML cannot read."""
    return GpuReadings(
        device_bytes=Reading.missing("NVML device delta", reason),
        process_bytes=Reading.missing("NVML process", reason),
        energy_j=Reading.missing("NVML energy counter", reason),
        facts=None,
    )


class GpuWindow:
    """Measures successive windows on one GPU.

    Args:
        gpu: The device.
        idle: Its state before CUDA started, or the error of reading it.
    """

    def __init__(self, gpu: Device, idle: Idle | NvmlError) -> None:
        self._gpu, self._idle = gpu, idle

    def start(self) -> None:
        """Start a window."""
        self._used_at_start = _query(self._used_bytes)
        self._energy_at_start = _query(self._gpu.energy_j)

    def end(self, wall_s: float, rows: Mapping[str, Column], torch_reserved_bytes: int | None) -> GpuReadings:
        """End the window.

        Args:
            wall_s: Its duration.
            rows: The sampler's rows of this window; empty without a sampler.
            torch_reserved_bytes: Torch's reserved peak in it, a lower bound on the truth; None where unknown.
        """
        energy = self._energy(wall_s)
        listed = _query(self._gpu.processes)
        own = [os.getpid(), *descendants(os.getpid())]
        facts = self._facts(rows, listed, own)
        floor = torch_reserved_bytes or 0
        sampled = "and sampled between" if len(rows.get("t_s", ())) else "only"
        return GpuReadings(
            device_bytes=self._device(rows, facts.other_processes, floor, sampled),
            process_bytes=_process(rows, listed, own, floor, sampled),
            energy_j=energy,
            facts=facts,
        )

    def _used_bytes(self) -> float:
        return float(self._gpu.memory().used)

    def _device(self, rows: Mapping[str, Column], others: int, floor: int, sampled: str) -> Reading:
        at_end = _query(self._used_bytes)
        direct = [used for used in (self._used_at_start, at_end) if isinstance(used, float)]
        seen = [*direct, *_present(rows, "device_bytes")]
        source = f"NVML device delta over the idle baseline, read at the window's ends {sampled}"
        if isinstance(self._idle, NvmlError):
            return Reading.missing(source, f"no idle baseline: {self._idle.reason}")
        if not seen:
            return Reading.missing(source, _reason(at_end))
        version = self._idle.memory.version
        value = max(seen) - self._idle.memory.used
        doubts = []
        if self._idle.cuda_had_started:
            doubts.append("CUDA had started before the idle baseline was taken")
        if isinstance(at_end, NvmlError):
            doubts.append(f"the maximum before NVML failed: {at_end.reason}")
        if others:
            doubts.append(f"{others} other processes held memory on this GPU")
        if value < floor:
            doubts.append(_missed(floor))
        return _doubted(value, f"{source} (v{version} memory)", doubts)

    def _energy(self, wall_s: float) -> Reading:
        source = "NVML energy counter"
        before, after = self._energy_at_start, _query(self._gpu.energy_j)
        for joules in (before, after):
            if isinstance(joules, NvmlError):
                return Reading.missing(source, joules.reason)
        if wall_s < MIN_ENERGY_S:
            return Reading.missing(source, f"a window of {wall_s:.3f} s is shorter than {MIN_ENERGY_S} s")
        assert isinstance(before, float)
        assert isinstance(after, float)
        if after <= before:
            return Reading.missing(source, "the counter did not increase, or was reset")
        return Reading(value=after - before, source=source)

    def _facts(self, rows: Mapping[str, Column], listed: dict[int, int | None] | NvmlError, own: list[int]) -> GpuFacts:
        others = 0
        if not isinstance(listed, NvmlError):
            others = _others(len(listed), sum(pid in listed for pid in own))
        counts = zip(_present(rows, "listed_processes"), _present(rows, "own_processes"), strict=True)
        others = max([others, *(_others(int(all_), int(mine)) for all_, mine in counts)])
        utilisation, temperature, clock, limits = (
            _present(rows, name) for name in ("utilisation_percent", "temperature_c", "sm_clock_mhz", "clock_limits")
        )
        throttled: dict[str, float] = {}
        for mask in limits:
            for label in self._gpu.throttles(int(mask)):
                throttled[label] = throttled.get(label, 0.0) + 1.0 / len(limits)
        return GpuFacts(
            utilisation_percent=float(np.mean(utilisation)) if len(utilisation) else None,
            temperature_c=float(np.max(temperature)) if len(temperature) else None,
            sm_clock_mhz=float(np.median(clock)) if len(clock) else None,
            other_processes=others,
            throttled=throttled,
        )


def idle_flags(idle: Idle | NvmlError) -> list[Flag]:
    """Flags a device that other processes used before this run."""
    if isinstance(idle, NvmlError):
        return []
    used = idle.memory.used if idle.memory.version == 2 else 0
    if not idle.processes and used < CONTEXT_BYTES:
        return []
    users = f"{idle.processes} processes" if idle.processes else "processes NVML does not list"
    message = f"the GPU was in use before this run started: {users}, {idle.memory.used / _MIB:.0f} MiB"
    return [Flag(code="foreign-process", message=message)]


def _process(
    rows: Mapping[str, Column], listed: dict[int, int | None] | NvmlError, own: list[int], floor: int, sampled: str
) -> Reading:
    source = f"NVML memory of this process and its children, read at the window's end {sampled}"
    mine: list[int | None] = []
    if isinstance(listed, NvmlError):
        reason = listed.reason
    else:
        mine = [listed[pid] for pid in own if pid in listed]
        reason = "NVML does not report the memory of single processes here"
        if not mine:
            reason = (
                f"not among the {len(listed)} processes NVML lists (in a container it lists ids of the host, or none)"
            )
    used = [float(size) for size in mine if size is not None]
    seen = [*([sum(used)] if used else []), *_present(rows, "process_bytes")]
    if not seen:
        return Reading.missing(source, reason)
    doubts = [_missed(floor)] if max(seen) < floor else []
    if isinstance(listed, NvmlError):
        doubts.append(f"the maximum before NVML failed: {reason}")
    return _doubted(max(seen), source, doubts)


def _others(listed: int, own: int) -> int:
    """Number of other processes. Where our own id is not listed (containers), one of those listed counts as ours."""
    return listed - own if own else max(0, listed - 1)


def _missed(floor: int) -> str:
    return f"less than the {floor / _MIB:.0f} MiB torch reserved: the peak was missed, or this is another process"


def _doubted(value: float, source: str, doubts: list[str]) -> Reading:
    return Reading(value=value, source=source, valid=not doubts, reason="; ".join(doubts) or None)


def _present(rows: Mapping[str, Column], name: str) -> Column:
    column = rows.get(name, np.empty(0))
    return column[~np.isnan(column)]


def _query(query: Callable[[], T]) -> T | NvmlError:
    try:
        return query()
    except NvmlError as error:
        return error


def _reason(answer: object) -> str:
    return answer.reason if isinstance(answer, NvmlError) else "nothing was read"
