"""The instruments on a real GPU: what they say grows with what is really used."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tpme.bench.run.launch import run_matrix
from tpme.bench.train.split import PARTS

pytestmark = pytest.mark.gpu

MIB = 1 << 20
RUN = """
import json, time
import torch
from tpme.bench.measure.phases import measuring
with measuring("cuda") as log:
    log.baseline()
    torch.zeros(1, device="cuda")
    with log.phase("load"):
        time.sleep(0.3)
    with log.phase("train"):
        block = torch.ones(MIB_HELD << 18, device="cuda")
        a = torch.randn(4096, 4096, device="cuda")
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            b = a @ a
            torch.cuda.synchronize()
samples = log.samples
print(json.dumps({
    "phases": [phase.model_dump() for phase in log.phases],
    "flags": [flag.model_dump() for flag in log.flags()],
    "counters": {name: reading.model_dump() for name, reading in log.counters().items()},
    "curve": [float(samples.device_bytes[0]), float(samples.device_bytes.max())],
    "notes": samples.notes,
}))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What one process says that holds 512 MiB and multiplies matrices for a second."""
    run = subprocess.run(
        [sys.executable, "-c", RUN.replace("MIB_HELD", "512")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    parsed: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return parsed


def memory(results: dict[str, Any], phase: int, name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = results["phases"][phase]["memory"][name]
    return parsed


def test_torch_and_the_device_grow_by_what_was_allocated(results: dict[str, Any]) -> None:
    allocated = memory(results, 1, "torch_allocated_bytes")["value"]
    assert allocated >= 512 * MIB
    before, after = (memory(results, phase, "nvml_device_bytes") for phase in (0, 1))
    assert before["valid"], before["reason"]
    assert after["valid"], after["reason"]
    assert after["value"] - before["value"] >= 512 * MIB
    assert after["value"] < allocated + 4096 * MIB


def test_the_process_holds_at_least_what_torch_reserved_or_is_missing_with_a_reason(results: dict[str, Any]) -> None:
    process = memory(results, 1, "nvml_process_bytes")
    if process["value"] is None:
        assert process["reason"]
        pytest.skip(f"NVML does not show this process here: {process['reason']}")
    assert process["value"] >= memory(results, 1, "torch_reserved_bytes")["value"]


def test_a_second_of_work_takes_energy(results: dict[str, Any]) -> None:
    energy = results["phases"][1]["energy_j"]
    if energy["value"] is None:
        pytest.skip(f"no energy counter here: {energy['reason']}")
    assert 5 < energy["value"] < 5000


def test_the_sampler_sees_the_memory_and_the_work(results: dict[str, Any]) -> None:
    first, most = results["curve"]
    assert most - first >= 512 * MIB
    assert results["counters"]["gpu_utilisation_percent"]["value"] > 0
    assert results["counters"]["gpu_temperature_c"]["value"] > 0
    assert results["counters"]["sampler_core_share"]["value"] < 0.05


def test_the_device_is_found_by_its_uuid() -> None:
    from tpme.bench.measure.nvml import Nvml
    from tpme.bench.measure.phases import select_gpu

    nvml = Nvml.open()
    device = select_gpu(nvml, torch.device("cuda"))
    before = device.memory().used
    block = torch.ones(256 << 18, device="cuda")
    torch.cuda.synchronize()
    assert device.memory().used - before >= 200 * MIB
    del block
    torch.cuda.empty_cache()
    nvml.close()


def test_time_is_read_after_the_work_is_done() -> None:
    from tpme.bench.measure.clock import now

    a = torch.randn(8192, 8192, device="cuda")
    torch.nn.functional.normalize(a @ a)  # loads the kernels, which waits
    start = now("cuda")
    for _ in range(20):
        a = torch.nn.functional.normalize(a @ a)
    queued = time.perf_counter() - start
    done = now("cuda") - start
    assert done > 2 * queued


def test_a_cell_is_measured_and_counts_what_a_cpu_counts(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    """The whole way, at a tiny shape: training, cache, phases, parts of a step; and the counters of another machine."""
    methods = ["lora", {"name": "iisan", "cached": [False, True]}]
    matrix = world.matrix(methods, protocol="paper", training={"epochs": 3, "precision": "fp16"})
    settings = {"store": world.store, "console": harness.quiet()}
    here, there = (run_matrix(matrix, tmp_path / device, device=device, **settings) for device in ("cuda", "cpu"))
    for on_gpu, on_cpu in zip(here, there, strict=True):
        assert on_gpu.status == on_cpu.status == "ok", (on_gpu.failure, on_cpu.failure)
        assert sum(phase.wall_s for phase in on_gpu.phases) == pytest.approx(on_gpu.wall_s, rel=0.01)
        memory, counters = on_gpu.training_memory, on_gpu.counters
        assert memory is not None
        allocated, device = memory.torch_allocated_bytes.value, memory.nvml_device_bytes
        assert allocated is not None
        assert device.value is None or not device.valid or device.value >= allocated
        for name in PARTS:
            assert (counters[name].value or 0) > 0, counters[name].reason
            assert "CUDA events" in counters[name].source
        assert 0 < (counters["mfu"].value or 0) < 1
        exact = [name for name, reading in counters.items() if "on meta" in reading.source or name.endswith("_bytes")]
        assert "forward_flops" in exact
        assert [counters[name] for name in exact] == [on_cpu.counters[name] for name in exact]
