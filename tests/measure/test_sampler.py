"""The sampler: sees what happens between two looks, stays cheap, and never outlives the process it watches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_nvml import GIB, FakeGpu, fake_nvml

from tpme.bench.measure.host import HAS_PROC, resident
from tpme.bench.measure.nvml import Nvml
from tpme.bench.measure.sampler import Sampler, SamplerError
from tpme.bench.measure.sampler_process import CPU_SHARE, LONGEST_PERIOD_S, SLOW_EVERY, Pace, Probe, calibrate

MIB = 1 << 20
pytestmark = pytest.mark.alone
linux = pytest.mark.skipif(not HAS_PROC, reason="needs Linux's /proc")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def gone(pid: int, within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_it_sees_a_block_that_comes_and_goes() -> None:
    with Sampler() as sampler:
        time.sleep(0.2)
        mark = sampler.mark()
        before = sampler.rows_since(0)["host_bytes"][-1]
        block = bytearray(b"x") * (200 * MIB)
        time.sleep(0.3)
        del block
        rows = sampler.rows_since(mark)
        time.sleep(0.2)
        samples = sampler.stop()
    assert samples.host_bytes.max() - before > 190 * MIB
    assert rows["host_bytes"].max() == samples.host_bytes.max()
    assert 2 <= len(rows["t_s"]) < len(samples.t_s)
    assert (np.diff(samples.t_s) > 0).all()
    assert 0 <= samples.t_s[0] < 5
    # Where a reading is slow, the period is longer; nothing else may be noted.
    assert all(note.startswith("sampled every ") for note in samples.notes)
    assert np.isnan(samples.device_bytes).all()
    assert samples.missing == {"device_bytes": "no CUDA device"}


def test_it_does_not_count_itself() -> None:
    with Sampler() as sampler:
        time.sleep(0.3)
        own = resident(os.getpid())
        samples = sampler.stop()
    assert own is not None
    assert np.median(samples.host_bytes) == pytest.approx(own.now, rel=0.02)
    assert samples.children_peak_bytes.max() == 0


@linux
def test_it_keeps_the_peaks_of_children_that_are_gone() -> None:
    code = "b = bytearray(b'x') * (100 << 20); del b; import time; time.sleep(1)"
    with Sampler() as sampler:
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(0.3)
        samples = sampler.stop()
    assert samples.children_peak_bytes.max() > 100 * MIB
    assert samples.children_peak_bytes[-1] == 0


def test_it_stays_cheap() -> None:
    with Sampler() as sampler:
        time.sleep(2)
        samples = sampler.stop()
    assert samples.cpu_fraction is not None
    assert 0 < samples.cpu_fraction < 0.05  # about 0.007; the rest is for a crowded machine


def test_the_pace_follows_the_cost_in_both_directions() -> None:
    pace = Pace(0.02)
    pace.cost(0.0001)
    assert pace.period_s == 0.02
    pace.cost(0.001)
    assert pace.period_s == pytest.approx(0.001 / CPU_SHARE)
    pace.cost(1.0)
    assert pace.period_s == LONGEST_PERIOD_S
    pace.cost(0.0001)
    assert pace.period_s == 0.02
    assert pace.longest_s == LONGEST_PERIOD_S


def test_a_slow_driver_lengthens_the_period_before_the_first_row() -> None:
    class Slow(Probe):
        def row(self) -> Any:
            end = time.process_time() + 0.002
            while time.process_time() < end:
                pass
            return super().row()

    pace = Pace(0.02)
    calibrate(Slow(os.getpid(), None), pace)
    assert pace.period_s > 0.19


def test_a_lengthened_period_is_said() -> None:
    sampler = Sampler(period_s=0.0001)
    with sampler:
        time.sleep(0.5)
        samples = sampler.stop()
    assert samples.longest_period_s > 0.0001
    assert "1 % of one core" in samples.notes[0]


def test_it_survives_ctrl_c_and_is_stopped_by_its_parent() -> None:
    with Sampler() as sampler:
        os.kill(sampler.pid, signal.SIGINT)
        time.sleep(0.2)
        samples = sampler.stop()
    assert all(note.startswith("sampled every ") for note in samples.notes)


def test_one_that_is_killed_leaves_its_rows_and_a_note() -> None:
    with Sampler() as sampler:
        time.sleep(0.3)
        os.kill(sampler.pid, signal.SIGKILL)
        samples = sampler.stop()
    assert len(samples.t_s) > 2
    assert samples.cpu_fraction is None
    assert "ended before the run" in samples.notes[0]


def test_an_error_in_the_measured_code_stops_it() -> None:
    with pytest.raises(ZeroDivisionError), Sampler() as sampler:  # noqa: PT012
        pid = sampler.pid
        raise ZeroDivisionError
    assert gone(pid)


def test_one_that_cannot_start_says_why() -> None:
    with pytest.raises(SamplerError, match="ValueError"):
        Sampler(period_s="soon").start()  # type: ignore[arg-type]


def test_without_a_driver_the_reason_comes_with_the_samples() -> None:
    with Sampler(gpu_uuid="GPU-none") as sampler:
        samples = sampler.stop()
    assert samples.missing["device_bytes"]
    assert np.isnan(samples.device_bytes).all()


ORPHAN = """
import os, sys, threading, time
from tpme.bench.measure.sampler import Sampler
sampler = Sampler()
START
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(60)  # like a loader worker: holds a copy of the pipe whose end would stop the sampler
print(sampler.pid, flush=True)
time.sleep(60)
"""
IN_A_THREAD = """
thread = threading.Thread(target=sampler.start)
thread.start()
thread.join()
time.sleep(0.3)
os.kill(sampler.pid, 0)
"""


@linux
@pytest.mark.parametrize("start", ["sampler.start()", IN_A_THREAD], ids=["main thread", "other thread"])
@pytest.mark.parametrize("children", ["none", "fork"])
def test_it_dies_with_its_parent_whatever_kills_that(start: str, children: str) -> None:
    code = ORPHAN.replace("START", start)
    with subprocess.Popen(
        [sys.executable, "-c", code, children], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert alive(pid)
            parent.kill()
            assert gone(pid)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_its_process_imports_nothing_heavy(fresh: Callable[[str], Any]) -> None:
    loaded = fresh(
        """
        import json, sys
        import tpme.bench.measure.sampler_process
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
        """
    )
    assert not {"torch", "pandas", "numpy", "pydantic", "transformers"} & set(loaded)


# --- the probe on a GPU ------------------------------------------------------------------------------------------


def probe(gpu: FakeGpu) -> Probe:
    return Probe(os.getpid(), Nvml.open(fake_nvml(gpu)).devices[0])


def test_the_probe_reads_the_gpu() -> None:
    row = probe(FakeGpu(used=4 * GIB, processes={os.getpid(): 3 * GIB, 10**9: GIB}, utilisation=55)).row()
    assert row.device_bytes == 4 * GIB
    assert row.process_bytes == 3 * GIB
    assert (row.listed_processes, row.own_processes) == (2, 1)
    assert (row.utilisation_percent, row.temperature_c, row.sm_clock_mhz, row.clock_limits) == (55, 60, 1980, 0)


def test_slow_readings_come_at_every_tenth_row() -> None:
    reads = probe(FakeGpu())
    rows = [reads.row() for _ in range(SLOW_EVERY + 1)]
    seen = [not np.isnan(row.temperature_c) for row in rows]
    assert [seen[0], any(seen[1:SLOW_EVERY]), seen[SLOW_EVERY]] == [True, False, True]
    assert not any(np.isnan(row.device_bytes) for row in rows)


def test_a_process_that_is_not_visible_is_nan_not_zero() -> None:
    row = probe(FakeGpu(processes={10**9: GIB})).row()
    assert np.isnan(row.process_bytes)
    assert np.isnan(probe(FakeGpu(processes={os.getpid(): None})).row().process_bytes)


def test_a_device_lost_on_the_way_is_nan_with_a_reason() -> None:
    gpu = FakeGpu()
    reads = probe(gpu)
    reads.row()
    gpu.lost = True
    rows = [reads.row() for _ in range(SLOW_EVERY)]
    assert all(np.isnan(row.device_bytes) for row in rows)
    assert all(row.host_bytes > 0 for row in rows)
    assert "lost" in reads.missing["device_bytes"]
    assert "lost" in reads.missing["process_bytes"]
