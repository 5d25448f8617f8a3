"""A fake pynvml: tests the instruments on healthy and broken GPUs without a GPU.

Every function is autospecced over the real one, so calling a function that pynvml does not have, or with wrong
arguments, fails as it would on a GPU. Constants and exceptions are pynvml's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

GIB = 1 << 30


@dataclass
class FakeGpu:
    """One fake device; tests change its fields while it is "running".

    ``errors`` maps a pynvml function to the NVML error it raises, as ``{"nvmlDeviceGetMemoryInfo": "GPU_IS_LOST"}``;
    ``lost`` makes every function raise GPU_IS_LOST.
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
    """MIG instances; a GPU that has any is in MIG mode."""
    has_v2: bool = True
    lost: bool = False
    errors: dict[str, str] = field(default_factory=dict)


def fake_nvml(*gpus: FakeGpu, errors: Mapping[str, str] | None = None) -> Any:
    """Return a fake pynvml module over ``gpus``. ``errors``: as in FakeGpu, for functions without a device."""
    import pynvml

    api = SimpleNamespace(**{name: value for name, value in vars(pynvml).items() if _is_constant(value)})

    def fails(code: str) -> Exception:
        error: Exception = pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}"))
        return error

    def add(function: str, answer: Callable[..., Any], failing: Callable[..., str | None]) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            code = failing(*args)
            result = fails(code) if code else answer(*args, **kwargs)
            if isinstance(result, Exception):
                raise result
            return result

        # Autospecced over the real function: its name must exist and its arguments must fit.
        setattr(api, function, mock.create_autospec(getattr(pynvml, function), side_effect=run))

    for function, answer in _system_answers(gpus).items():
        add(function, answer, lambda *_, name=function: (errors or {}).get(name))
    for function, answer in _device_answers(fails).items():
        add(function, answer, lambda gpu, *_, name=function: "GPU_IS_LOST" if gpu.lost else gpu.errors.get(name))
    return api


def _system_answers(gpus: Sequence[FakeGpu]) -> dict[str, Callable[..., Any]]:
    return {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "595.10",
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: gpus[index],
    }


def _device_answers(fails: Callable[[str], Exception]) -> dict[str, Callable[..., Any]]:
    """The answers of a healthy FakeGpu by pynvml function."""

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


def _is_constant(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, type) and issubclass(value, BaseException))
