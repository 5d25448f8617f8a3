"""A stand-in for pynvml: the instruments' behaviour on GPUs, and on broken ones, without a GPU.

It is autospecced over the real module, so a call to a function that pynvml does not have, or with the wrong
number of arguments, fails here as it would on a GPU. Constants and exceptions are the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

GIB = 1 << 30


@dataclass
class FakeGpu:
    """One pretended device; tests change its fields while it is "running".

    ``errors`` maps a pynvml function to the NVML error it answers with, as ``{"nvmlDeviceGetMemoryInfo":
    "GPU_IS_LOST"}``; ``lost`` lets all of them fail so.
    """

    uuid: str = "GPU-11111111-2222-3333-4444-555555555555"
    name: str = "NVIDIA Fake 80GB"
    used: int = 1 * GIB
    reserved: int = GIB // 2
    total: int = 80 * GIB
    processes: dict[int, int | None] = field(default_factory=dict)
    energy_mj: int = 1_000_000
    utilisation: int = 90
    temperature: int = 60
    sm_clock: int = 1980
    clock_limits: int = 0
    instances: list[FakeGpu] = field(default_factory=list)
    """MIG instances; any make the GPU one in MIG mode."""
    has_v2: bool = True
    lost: bool = False
    errors: dict[str, str] = field(default_factory=dict)


def fake_nvml(*gpus: FakeGpu, errors: Mapping[str, str] | None = None) -> Any:
    """A module like pynvml over ``gpus``. ``errors``: as in FakeGpu, for functions that ask no device."""
    import pynvml

    api = mock.create_autospec(pynvml, instance=True)
    _copy_constants(pynvml, api)

    def fails(code: str) -> Exception:
        error: Exception = pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}"))
        return error

    def system(function: str, answer: Any) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            if errors and function in errors:
                raise fails(errors[function])
            return answer(*args, **kwargs)

        getattr(api, function).side_effect = run

    def device(function: str, answer: Any) -> None:
        def run(gpu: FakeGpu, *args: Any, **kwargs: Any) -> Any:
            code = "GPU_IS_LOST" if gpu.lost else gpu.errors.get(function)
            if code:
                raise fails(code)
            told = answer(gpu, *args, **kwargs)
            if isinstance(told, Exception):
                raise told
            return told

        getattr(api, function).side_effect = run

    system("nvmlInit", lambda: None)
    system("nvmlShutdown", lambda: None)
    system("nvmlSystemGetDriverVersion", lambda: "595.10")
    system("nvmlDeviceGetCount", lambda: len(gpus))
    system("nvmlDeviceGetHandleByIndex", lambda index: gpus[index])
    for function, answer in _answers(fails).items():
        device(function, answer)
    return api


def _answers(fails: Any) -> dict[str, Any]:
    """pynvml function -> what a healthy FakeGpu answers."""

    def memory(gpu: FakeGpu, version: int | None = None) -> Any:
        if version and not gpu.has_v2:
            return fails("FUNCTION_NOT_FOUND")
        used = gpu.used if version else gpu.used + gpu.reserved
        return SimpleNamespace(used=used, total=gpu.total, free=gpu.total - used)

    def instance(gpu: FakeGpu, index: int) -> Any:
        return gpu.instances[index] if index < len(gpu.instances) else fails("NOT_FOUND")

    def processes(gpu: FakeGpu) -> Any:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.processes.items()]

    return {
        "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
        "nvmlDeviceGetName": lambda gpu: gpu.name,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetMigMode": lambda gpu: [int(bool(gpu.instances)), int(bool(gpu.instances))],
        "nvmlDeviceGetMaxMigDeviceCount": lambda gpu: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": instance,
        "nvmlDeviceGetComputeRunningProcesses": processes,
        "nvmlDeviceGetGraphicsRunningProcesses": lambda gpu: [],
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=gpu.utilisation, memory=0),
        "nvmlDeviceGetTemperature": lambda gpu, sensor: gpu.temperature,
        "nvmlDeviceGetClockInfo": lambda gpu, kind: gpu.sm_clock,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: gpu.clock_limits,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: gpu.clock_limits,
        "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: gpu.energy_mj,
    }


def _copy_constants(real: ModuleType, api: Any) -> None:
    for name in dir(real):
        value = getattr(real, name)
        if isinstance(value, int) or (isinstance(value, type) and issubclass(value, BaseException)):
            setattr(api, name, value)
