"""GPU windows over the fake NVML: each value, and each doubt about it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fake_nvml import GIB, FakeGpu, fake_nvml

from tpme.bench.measure.gpu import GpuReadings, GpuWindow, idle_flags
from tpme.bench.measure.nvml import Idle, Nvml
from tpme.bench.measure.sampler import Column

ME = os.getpid()
MIB = 1 << 20


def window(gpu: FakeGpu) -> GpuWindow:
    """A window, not started, on the only device NVML knows (the MIG instance where there is one)."""
    nvml = Nvml.open(fake_nvml(gpu))
    device = nvml.devices[-1]
    return GpuWindow(device, nvml.idle[device.uuid])


def end(gpu_window: GpuWindow, *, wall_s: float = 1.0, reserved: int | None = None, **rows: list[float]) -> GpuReadings:
    """End a window with the given sampler columns, all equally long."""
    columns: dict[str, Column] = {name: np.array(values, dtype=float) for name, values in rows.items()}
    return gpu_window.end(wall_s, columns, reserved)


def measured(gpu: FakeGpu, used: int, process: int | None, **settings: float) -> GpuReadings:
    """A window in which the device came to hold ``used`` bytes and this process ``process``."""
    gpu_window = window(gpu)
    gpu_window.start()
    gpu.used, gpu.processes, gpu.energy_mj = used, gpu.processes | {ME: process}, gpu.energy_mj + 250_000
    return end(gpu_window, **settings)  # type: ignore[arg-type]


def test_a_healthy_window() -> None:
    readings = measured(FakeGpu(used=1 * GIB), used=5 * GIB, process=3 * GIB, reserved=2 * GIB)
    assert readings.device_bytes.value == 4 * GIB
    assert readings.process_bytes.value == 3 * GIB
    assert readings.energy_j.value == 250.0
    assert readings.device_bytes.valid
    assert readings.process_bytes.valid
    assert "v2" in readings.device_bytes.source


def test_the_first_memory_struct_still_gives_a_true_difference() -> None:
    readings = measured(FakeGpu(used=1 * GIB, reserved=GIB, has_v2=False), used=5 * GIB, process=3 * GIB)
    assert readings.device_bytes.value == 4 * GIB
    assert "v1" in readings.device_bytes.source


def test_a_peak_between_the_ends_is_the_samplers_to_see() -> None:
    gpu = FakeGpu(used=1 * GIB)
    gpu_window = window(gpu)
    gpu_window.start()
    gpu.processes = {ME: GIB}
    nan = float("nan")
    readings = end(
        gpu_window,
        t_s=[0, 1, 2],
        device_bytes=[1 * GIB, 7 * GIB, nan],
        process_bytes=[nan, 6 * GIB, nan],
        listed_processes=[nan, 1, nan],
        own_processes=[nan, 1, nan],
    )
    assert readings.device_bytes.value == 6 * GIB
    assert readings.process_bytes.value == 6 * GIB
    assert "sampled" in readings.device_bytes.source


def test_less_than_torch_holds_is_not_believed() -> None:
    readings = measured(FakeGpu(used=GIB), used=GIB + 10 * MIB, process=5 * MIB, reserved=2 * GIB)
    for reading in (readings.device_bytes, readings.process_bytes):
        assert reading.value is not None
        assert not reading.valid
        assert "2048 MiB torch reserved" in str(reading.reason)


def test_a_process_nvml_does_not_show_is_missing_with_the_container_caveat() -> None:
    gpu = FakeGpu()
    gpu_window = window(gpu)
    gpu_window.start()
    gpu.processes = {10**9: 4 * GIB}  # this process, as the host numbers it
    readings = end(gpu_window)
    assert readings.process_bytes.value is None
    assert "container" in str(readings.process_bytes.reason)
    assert readings.device_bytes.valid, "the one process listed is taken for this one, not for a stranger"


def test_a_process_without_a_number_is_missing_not_zero() -> None:
    readings = measured(FakeGpu(), used=2 * GIB, process=None)
    assert readings.process_bytes.value is None
    assert "single processes" in str(readings.process_bytes.reason)


def test_other_processes_spoil_the_device_but_not_the_process() -> None:
    readings = measured(FakeGpu(processes={1: GIB}), used=6 * GIB, process=3 * GIB)
    assert not readings.device_bytes.valid
    assert "1 other processes" in str(readings.device_bytes.reason)
    assert readings.process_bytes.valid
    assert readings.facts is not None
    assert readings.facts.other_processes == 1


def test_a_stranger_seen_only_by_the_sampler_spoils_it_too() -> None:
    gpu = FakeGpu()
    gpu_window = window(gpu)
    gpu_window.start()
    gpu.processes = {ME: GIB}
    readings = end(gpu_window, t_s=[0], listed_processes=[3], own_processes=[1])
    assert "2 other processes" in str(readings.device_bytes.reason)


def test_a_device_lost_on_the_way_leaves_a_lower_bound_and_no_energy() -> None:
    gpu = FakeGpu(used=GIB)
    gpu_window = window(gpu)
    gpu_window.start()
    gpu.lost = True
    readings = end(gpu_window, t_s=[0.0], device_bytes=[3.0 * GIB], process_bytes=[2.0 * GIB])
    assert readings.device_bytes.value == 2 * GIB
    assert not readings.device_bytes.valid
    assert "lost" in str(readings.device_bytes.reason)
    assert readings.process_bytes.value == 2 * GIB
    assert not readings.process_bytes.valid
    assert readings.energy_j.value is None
    assert "lost" in str(readings.energy_j.reason)


def test_a_device_lost_before_any_reading_has_none() -> None:
    gpu = FakeGpu()
    gpu_window = window(gpu)
    gpu.lost = True
    gpu_window.start()
    readings = end(gpu_window)
    assert readings.device_bytes.value is None
    assert readings.process_bytes.value is None


@pytest.mark.parametrize(("code", "words"), [("NOT_SUPPORTED", "Not Supported"), ("NO_PERMISSION", "Permissions")])
def test_no_energy_counter_is_a_reason_not_a_zero(code: str, words: str) -> None:
    readings = measured(FakeGpu(errors={"nvmlDeviceGetTotalEnergyConsumption": code}), used=GIB, process=GIB)
    assert readings.energy_j.value is None
    assert words in str(readings.energy_j.reason)


def test_a_short_window_has_no_energy() -> None:
    readings = measured(FakeGpu(), used=GIB, process=GIB, wall_s=0.05)
    assert readings.energy_j.value is None
    assert "0.050 s" in str(readings.energy_j.reason)


def test_a_counter_that_stands_still_has_no_energy() -> None:
    gpu_window = window(FakeGpu())
    gpu_window.start()
    assert end(gpu_window).energy_j.value is None


def test_a_mig_instance_has_memory_but_no_energy() -> None:
    gpu = FakeGpu(instances=[FakeGpu(uuid="MIG-1", used=GIB)])
    gpu_window = window(gpu)
    gpu_window.start()
    gpu.instances[0].used = 3 * GIB
    readings = end(gpu_window)
    assert readings.device_bytes.value == 2 * GIB
    assert "MIG" in str(readings.energy_j.reason)


def test_without_a_baseline_there_is_no_difference() -> None:
    gpu = FakeGpu(errors={"nvmlDeviceGetMemoryInfo": "NO_PERMISSION"})
    gpu_window = window(gpu)
    gpu.errors = {}
    gpu_window.start()
    readings = end(gpu_window)
    assert readings.device_bytes.value is None
    assert "no idle baseline" in str(readings.device_bytes.reason)


def test_a_baseline_taken_too_late_is_doubted() -> None:
    nvml = Nvml.open(fake_nvml(FakeGpu()))
    baseline = nvml.idle[nvml.devices[0].uuid]
    assert isinstance(baseline, Idle)
    gpu_window = GpuWindow(nvml.devices[0], Idle(baseline.memory, 0, cuda_had_started=True))
    gpu_window.start()
    assert "CUDA had started" in str(end(gpu_window).device_bytes.reason)


def test_the_state_of_the_gpu_over_a_window() -> None:
    gpu_window = window(FakeGpu())
    gpu_window.start()
    nan = float("nan")
    readings = end(
        gpu_window,
        t_s=[0, 1, 2, 3],
        utilisation_percent=[80, nan, nan, 90],
        temperature_c=[60, nan, nan, 65],
        sm_clock_mhz=[1900, nan, nan, 1800],
        clock_limits=[0x4, nan, nan, 0x1],
    )
    facts = readings.facts
    assert facts is not None
    assert (facts.utilisation_percent, facts.temperature_c, facts.sm_clock_mhz) == (85.0, 65.0, 1850.0)
    assert facts.throttled == {"power cap": 0.5}


def test_without_a_sampler_the_state_is_unknown_not_zero() -> None:
    gpu_window = window(FakeGpu())
    gpu_window.start()
    facts = end(gpu_window).facts
    assert facts is not None
    assert facts.utilisation_percent is None
    assert facts.temperature_c is None


@pytest.mark.parametrize(
    ("used", "processes", "flagged"),
    [(5 * MIB, {}, False), (400 * MIB, {}, True), (5 * MIB, {8: None}, True)],
)
def test_a_gpu_in_use_before_the_run_is_flagged(used: int, processes: dict[int, int | None], flagged: bool) -> None:
    nvml = Nvml.open(fake_nvml(FakeGpu(used=used, processes=processes)))
    assert bool(idle_flags(nvml.idle[nvml.devices[0].uuid])) is flagged
