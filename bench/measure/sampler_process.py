"""The sampler's process: ``python -m ...sampler_process PARENT PERIOD_S bound|unbound [GPU_UUID]``.

Reads the memory of the parent's process tree and the GPU's state, and writes one row of doubles (``COLUMNS``) per
reading to standard output. Standard error carries two JSON lines: one when it is ready, one with its cost at the end.
It ends when its standard input is closed or its parent has ended. With ``bound`` the kernel also kills it with the
parent's *thread* that started it, so only the main thread may use ``bound``.

Imports the standard library and pynvml only, to stay small and start fast.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tpme.bench.lifetimes import die_with_parent
from tpme.bench.measure.host import HAS_PROC, descendants, parse_status, resident
from tpme.bench.measure.nvml import Device, Nvml, NvmlError

CPU_SHARE = 0.0095
"""Target for the sampler's share of one core, a little below the documented 0.01."""
LONGEST_PERIOD_S = 1.0
SLOW_EVERY = 10
"""Rows between two readings of the process tree and of the slower GPU values."""
_SETTLE = 25
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Row(NamedTuple):
    """One reading; NaN where a slow column was not due or a value cannot be read (``missing`` says why)."""

    t_s: float
    """``time.perf_counter``, shared by all processes of a machine."""
    host_bytes: float = math.nan
    children_peak_bytes: float = math.nan
    """Sum of the high-water marks of the living children."""
    device_bytes: float = math.nan
    process_bytes: float = math.nan
    listed_processes: float = math.nan
    own_processes: float = math.nan
    utilisation_percent: float = math.nan
    temperature_c: float = math.nan
    sm_clock_mhz: float = math.nan
    clock_limits: float = math.nan


COLUMNS = Row._fields
ROW = struct.Struct(f"{len(COLUMNS)}d")


class Probe:
    """Reads one row at a time.

    Args:
        root: The process whose tree is read, without this process.
        gpu: The device to read, if any.
    """

    def __init__(self, root: int, gpu: Device | None) -> None:
        self._root, self._gpu = root, gpu
        self._tick = 0
        self._children: dict[int, int] = {}
        self._statm = os.open(f"/proc/{root}/statm", os.O_RDONLY) if HAS_PROC else -1
        self.missing: dict[str, str] = {}

    def row(self) -> Row:
        """Read all values that are due."""
        slow = self._tick % SLOW_EVERY == 0
        self._tick += 1
        if slow:
            self._find_children()
        row = Row(time.perf_counter())
        host, peaks = self._host()
        row = row._replace(host_bytes=host, children_peak_bytes=peaks)
        if self._gpu is None:
            return row
        row = row._replace(device_bytes=self._try("device_bytes", self._device_bytes))
        return self._slow_gpu(row) if slow else row

    def _host(self) -> tuple[float, float]:
        """Resident bytes of the tree, and the summed high-water marks of the children."""
        if HAS_PROC:
            total = int(os.pread(self._statm, 128, 0).split()[1]) * _PAGE
        else:
            own = resident(self._root)
            total = own.now if own else 0
        peaks = 0
        for pid, handle in list(self._children.items()):
            try:
                child = parse_status(os.pread(handle, 4096, 0)) if HAS_PROC else resident(pid)
            except OSError:  # it has ended
                os.close(handle)
                del self._children[pid]
                continue
            if child is not None:
                total, peaks = total + child.now, peaks + child.peak
        return float(total), float(peaks)

    def _find_children(self) -> None:
        for pid in descendants(self._root, exclude=(os.getpid(),)):
            if pid not in self._children:
                try:
                    self._children[pid] = os.open(f"/proc/{pid}/status", os.O_RDONLY) if HAS_PROC else -1
                except OSError:
                    continue

    def _slow_gpu(self, row: Row) -> Row:
        gpu = self._gpu
        assert gpu is not None
        row = row._replace(
            utilisation_percent=self._try("utilisation_percent", gpu.utilisation_percent),
            temperature_c=self._try("temperature_c", gpu.temperature_c),
            sm_clock_mhz=self._try("sm_clock_mhz", gpu.sm_clock_mhz),
            clock_limits=self._try("clock_limits", gpu.clock_limits),
        )
        try:
            listed = gpu.processes()
        except NvmlError as error:
            self.missing["process_bytes"] = error.reason
            return row
        own = [listed[pid] for pid in (self._root, *self._children) if pid in listed]
        sizes = [used for used in own if used is not None]
        return row._replace(
            listed_processes=float(len(listed)),
            own_processes=float(len(own)),
            process_bytes=float(sum(sizes)) if sizes else math.nan,
        )

    def _device_bytes(self) -> float:
        assert self._gpu is not None
        return float(self._gpu.memory().used)

    def _try(self, column: str, query: Callable[[], float]) -> float:
        """The value, or NaN with the reason in ``missing``."""
        try:
            return float(query())
        except NvmlError as error:
            self.missing[column] = error.reason
            return math.nan


class Pace:
    """Limits the sampler's CPU time by lengthening its period.

    Args:
        period_s: The period requested.
    """

    def __init__(self, period_s: float) -> None:
        self.wanted_s = self.period_s = self.longest_s = period_s

    def cost(self, cpu_s_per_row: float) -> None:
        """Adapt the period, up or down, to the CPU time of one row."""
        needed = min(cpu_s_per_row / CPU_SHARE, LONGEST_PERIOD_S)
        self.period_s = max(self.wanted_s, needed)
        self.longest_s = max(self.longest_s, self.period_s)


def sample(probe: Probe, pace: Pace, parent: int, control: int, output: int) -> dict[str, float]:
    """Write rows until ``control`` is closed or ``parent`` has ended; returns wall and CPU time."""
    started, cpu_started = time.perf_counter(), time.process_time()
    due, rows, cpu_before = started, 0, cpu_started
    while os.getppid() == parent:
        try:
            os.write(output, ROW.pack(*probe.row()))
        except ProcessLookupError:
            break  # the parent ended between the check and the reading
        rows += 1
        if rows % _SETTLE == 0:
            cpu = time.process_time()
            pace.cost((cpu - cpu_before) / _SETTLE)
            cpu_before = cpu
        due = max(due + pace.period_s, time.perf_counter())
        if select.select([control], [], [], max(0.0, due - time.perf_counter()))[0]:
            break
    return {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_started}


def calibrate(probe: Probe, pace: Pace) -> None:
    """Time a few rows first, to keep within the CPU share from the first second, also with a slow driver."""
    before = time.process_time()
    for _ in range(SLOW_EVERY):
        probe.row()
    pace.cost((time.process_time() - before) / SLOW_EVERY)


def main(arguments: list[str]) -> None:
    """Run the sampler; see the module docstring."""
    parent, period_s = int(arguments[0]), float(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if arguments[2] == "bound":
        die_with_parent(parent)  # even while it hangs in the driver
    gpu, missing = None, {}
    if len(arguments) > 3:
        try:
            gpu = Nvml.open().find(arguments[3])
        except NvmlError as error:
            missing["device_bytes"] = error.reason
    probe, pace = Probe(parent, gpu), Pace(period_s)
    probe.missing.update(missing)
    calibrate(probe, pace)
    _send({"ready": True})
    spent = sample(probe, pace, parent, control=0, output=1)
    _send({**spent, "longest_period_s": pace.longest_s, "missing": probe.missing})


def _send(message: object) -> None:
    try:
        sys.stderr.write(json.dumps(message) + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        os._exit(0)  # the parent has ended


if __name__ == "__main__":
    main(sys.argv[1:])
