"""Samples memory and GPU state from a separate process, which does not share the interpreter lock of the measured one.

The measured process pays only for starting it: the sampler writes rows straight into an unnamed temporary file.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tpme.bench.measure.sampler_process import COLUMNS, ROW

PERIOD_S = 0.02
_START_S = 30.0
_STOP_S = 10.0

Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SampledCurve:
    """The samples of one run; all arrays have shape (N,), NaN where nothing was read at that time.

    Slow columns (all of the GPU's but ``device_bytes``) are read at every tenth row. ``missing`` says why a column is
    empty.
    """

    t_s: Column
    """Since the origin given to ``stop``."""
    host_bytes: Column
    """Resident memory of the process tree."""
    children_peak_bytes: Column
    device_bytes: Column
    """As NVML reports it: the idle baseline is not subtracted."""
    process_bytes: Column
    listed_processes: Column
    own_processes: Column
    utilisation_percent: Column
    temperature_c: Column
    sm_clock_mhz: Column
    clock_limits: Column
    period_s: float
    """The period requested."""
    longest_period_s: float
    """The longest period used to keep the sampler cheap."""
    cpu_fraction: float | None
    """The sampler's CPU time as a share of one core; None if it ended early."""
    notes: tuple[str, ...] = ()
    """Warnings about the curve: a lengthened period, an early end."""
    missing: dict[str, str] = field(default_factory=dict)


class SamplerError(RuntimeError):
    """The sampler's process did not start; the message holds its output."""


class Sampler:
    """Starts, stops and reads the sampler's process. A context manager: ``with Sampler() as sampler``.

    Args:
        gpu_uuid: NVML's UUID of the device to sample; None for a CPU run.
        period_s: Time between two rows; lengthened where sampling would take more than 1 % of one core.
    """

    def __init__(self, gpu_uuid: str | None = None, period_s: float = PERIOD_S) -> None:
        self._uuid, self.period_s = gpu_uuid, period_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The sampler's process id, to exclude from the measurement."""
        return self._running().pid

    def start(self) -> Self:
        """Start sampling; returns when the sampler is ready. Raises SamplerError."""
        # Both processes share one file offset, which the sampler moves; read by position only.
        self._rows = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        # -P: never import a folder named "tpme" from the working directory.
        call = [sys.executable, "-P", "-m", "tpme.bench.measure.sampler_process", str(os.getpid()), str(self.period_s)]
        bound = "bound" if threading.current_thread() is threading.main_thread() else "unbound"
        self._process = subprocess.Popen(
            [*call, bound, *([self._uuid] if self._uuid else [])],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=self._rows,
            stderr=subprocess.PIPE,
        )
        self._started_s = time.perf_counter()
        assert self._process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stderr, selectors.EVENT_READ)
            output = self._process.stderr.readline() if selector.select(_START_S) else b""
        if b'"ready"' not in output:
            output += _end(self._process)
            self._process = None
            raise SamplerError(f"the sampler did not start: {output.decode(errors='replace').strip() or 'no output'}")
        return self

    def mark(self) -> int:
        """Number of rows so far, to mark the start of a window."""
        return os.fstat(self._rows.fileno()).st_size // ROW.size

    def rows_since(self, mark: int) -> dict[str, Column]:
        """The rows since ``mark`` by column, each (n,); ``t_s`` is ``time.perf_counter``."""
        count = self.mark() - mark
        data = os.pread(self._rows.fileno(), count * ROW.size, mark * ROW.size)
        table = np.frombuffer(data, dtype=np.float64).reshape(-1, len(COLUMNS))
        return dict(zip(COLUMNS, table.T, strict=True))

    def stop(self, origin_s: float | None = None) -> SampledCurve:
        """Stop sampling and return the curve.

        Args:
            origin_s: The ``time.perf_counter`` that becomes 0 in ``t_s``; by default the sampler's start.
        """
        process = self._running()
        summary = _last_message(_end(process))
        columns = self.rows_since(0)
        self._process = None
        self._rows.close()
        columns["t_s"] = columns["t_s"] - (self._started_s if origin_s is None else origin_s)
        longest = summary["longest_period_s"] if summary else self.period_s
        return SampledCurve(
            **{name: np.ascontiguousarray(column) for name, column in columns.items()},
            period_s=self.period_s,
            longest_period_s=longest,
            cpu_fraction=summary["cpu_s"] / summary["wall_s"] if summary else None,
            notes=tuple(self._notes(longest, process.returncode, finished=bool(summary))),
            missing=({} if self._uuid else {"device_bytes": "no CUDA device"}) | summary.get("missing", {}),
        )

    def _notes(self, longest_s: float, returncode: int, *, finished: bool) -> list[str]:
        notes: list[str] = []
        if longest_s > 1.25 * self.period_s:
            notes.append(
                f"sampled every {1000 * longest_s:.0f} ms at times instead of {1000 * self.period_s:.0f} ms, "
                "to stay within 1 % of one core"
            )
        if not finished:
            notes.append(f"the sampler ended before the run did (exit status {returncode}); the curve is cut short")
        return notes

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the sampler is not running")
        return self._process

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.stop()


def _end(process: subprocess.Popen[bytes]) -> bytes:
    """End the sampler by closing its input; returns the rest of its standard error."""
    try:
        return process.communicate(timeout=_STOP_S)[1]
    except subprocess.TimeoutExpired:  # it hangs in the driver
        process.kill()
        return process.communicate()[1]


def _last_message(output: bytes) -> dict[str, Any]:
    """The JSON line the sampler ends with; empty if it ended early."""
    for line in reversed(output.splitlines()):
        if line.startswith(b"{"):
            message: dict[str, Any] = json.loads(line)
            return message
    return {}
