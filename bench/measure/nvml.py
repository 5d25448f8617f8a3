"""NVIDIA's management library: the only module that calls pynvml.

Every failure becomes an ``NvmlError`` whose ``reason`` is a sentence for the record; nothing here ever answers 0
for something it does not know. ``Nvml.open`` must run before CUDA starts in this process: it notes what every
device holds while idle, and whose processes are already on it.

Traps this module absorbs:

* NVML's version 1 ``used`` includes what the driver reserved; version 2 tells it apart. The version goes with the
  value, and a difference is only taken between equal versions.
* In a container the process list shows ids of the host, or nothing.
* On a MIG instance energy, clocks and temperature are the whole GPU's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpme.bench.measure.visible import Known, choose

REASONS: Mapping[str, str] = {
    "UNINITIALIZED": "NVML was not initialised",
    "INVALID_ARGUMENT": "NVML rejected an argument",
    "NOT_SUPPORTED": "this device does not support it",
    "NO_PERMISSION": "no permission to read it",
    "ALREADY_INITIALIZED": "NVML was already initialised",
    "NOT_FOUND": "the device or process was not found",
    "INSUFFICIENT_SIZE": "NVML had more to tell than fitted its answer",
    "INSUFFICIENT_POWER": "the GPU's power cables are not attached properly",
    "DRIVER_NOT_LOADED": "the NVIDIA driver is not loaded",
    "TIMEOUT": "the driver did not answer in time",
    "IRQ_ISSUE": "the kernel reports an interrupt problem with the GPU",
    "LIBRARY_NOT_FOUND": "no NVIDIA driver (its library libnvidia-ml was not found)",
    "FUNCTION_NOT_FOUND": "the installed driver is too old to tell it",
    "CORRUPTED_INFOROM": "the GPU's InfoROM is corrupted",
    "GPU_IS_LOST": "the GPU was lost (fell off the bus or was made inaccessible)",
    "RESET_REQUIRED": "the GPU needs a reset",
    "OPERATING_SYSTEM": "the operating system or a control group blocks the device",
    "LIB_RM_VERSION_MISMATCH": "driver and NVML library have different versions (reboot after a driver update)",
    "IN_USE": "the GPU is in use by another operation",
    "MEMORY": "NVML ran out of memory",
    "NO_DATA": "the device has no data for it yet",
    "VGPU_ECC_NOT_SUPPORTED": "not available on a virtual GPU with ECC",
    "INSUFFICIENT_RESOURCES": "the device lacks the resources to answer",
    "FREQ_NOT_SUPPORTED": "the device does not support this frequency",
    "ARGUMENT_VERSION_MISMATCH": "the installed driver does not know this version of the request",
    "DEPRECATED": "the installed driver no longer tells it",
    "NOT_READY": "the device is not ready yet",
    "GPU_NOT_FOUND": "no GPU was found",
    "INVALID_STATE": "the device is in a state in which it cannot be read",
    "RESET_TYPE_NOT_SUPPORTED": "this kind of reset is not supported",
    "UNKNOWN": "NVML reports an unknown error",
}
"""NVML's error codes, without their prefix ``NVML_ERROR_``, in words."""

THROTTLES: Mapping[str, str] = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal limit",
    "HwThermalSlowdown": "hardware thermal limit",
    "HwPowerBrakeSlowdown": "external power brake",
}
"""Reasons for a lowered clock that disturb a measurement (idle and user-set clocks do not), in words."""


class NvmlError(Exception):
    """NVML could not answer. ``code``: its error without the prefix, or a name of ours; ``reason``: in words."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a device in bytes; ``version`` 1 counts what the driver reserved as used, 2 does not."""

    used: int
    total: int
    version: int


class Device:
    """One GPU or MIG instance. Every query raises NvmlError where there is no answer.

    Args:
        api: The module ``pynvml`` or its fake.
        handle: NVML's handle.
        index: The GPU's NVML index; None for a MIG instance.
        parent: The UUID of a MIG instance's GPU.
    """

    def __init__(self, api: Any, handle: Any, index: int | None, parent: str | None = None) -> None:
        self._api, self._handle = api, handle
        self.uuid = _text(self._ask("GetUUID"))
        self.name = _text(self._ask("GetName"))
        self.known = Known(uuid=self.uuid, name=self.name, index=index, parent=parent)
        self.is_mig = parent is not None
        self._memory_version = 2

    def _ask(self, what: str, *args: Any, **kwargs: Any) -> Any:
        return call(self._api, f"nvmlDevice{what}", self._handle, *args, **kwargs)

    def memory(self) -> MemoryUse:
        """Device memory in use by everything on it."""
        if self._memory_version == 2:
            try:
                told = self._ask("GetMemoryInfo", version=self._api.nvmlMemory_v2)
                return MemoryUse(used=int(told.used), total=int(told.total), version=2)
            except NvmlError as error:
                if error.code not in ("FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH", "NOT_SUPPORTED"):
                    raise
                self._memory_version = 1
        told = self._ask("GetMemoryInfo")
        return MemoryUse(used=int(told.used), total=int(told.total), version=1)

    def processes(self) -> dict[int, int | None]:
        """Processes that hold memory here: id (of whatever PID namespace NVML sees) -> bytes, None where not told."""
        held: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            try:
                listed = self._ask(f"Get{kind}RunningProcesses")
            except NvmlError as error:
                if kind == "Compute" or error.code == "GPU_IS_LOST":
                    raise
                continue  # data-centre devices and MIG instances have no graphics processes to list
            for process in listed:
                used = process.usedGpuMemory
                held[int(process.pid)] = None if used is None else int(used)
        return held

    def utilisation_percent(self) -> float:
        """Share of the last sample period in which a kernel ran; says nothing about how full the GPU was."""
        return float(self._ask("GetUtilizationRates").gpu)

    def temperature_c(self) -> float:
        """Core temperature."""
        return float(self._ask("GetTemperature", self._api.NVML_TEMPERATURE_GPU))

    def sm_clock_mhz(self) -> float:
        """Clock of the multiprocessors now."""
        return float(self._ask("GetClockInfo", self._api.NVML_CLOCK_SM))

    def clock_limits(self) -> int:
        """Bit mask of what holds the clock down now; ``throttles`` puts it in words."""
        try:
            return int(self._ask("GetCurrentClocksEventReasons"))
        except NvmlError as error:
            if error.code != "FUNCTION_NOT_FOUND":
                raise
            return int(self._ask("GetCurrentClocksThrottleReasons"))  # the same query in drivers before 535

    def throttles(self, mask: int) -> list[str]:
        """The disturbing reasons in a mask of ``clock_limits``, in words."""
        return [
            words for name, words in THROTTLES.items() if mask & getattr(self._api, f"nvmlClocksThrottleReason{name}")
        ]

    def energy_j(self) -> float:
        """Joules since the driver was loaded, by the hardware counter (which moves about ten times a second)."""
        if self.is_mig:
            raise NvmlError("MIG", "the energy counter covers the whole GPU, not one MIG instance")
        return float(self._ask("GetTotalEnergyConsumption")) / 1000.0


@dataclass(frozen=True)
class Idle:
    """A device before CUDA started in this process: its memory use and the processes already there."""

    memory: MemoryUse
    processes: int | None
    """How many; None where NVML does not list them."""
    cuda_had_started: bool


class Nvml:
    """NVML, open or (``unavailable`` says why) not.

    ``devices`` holds every GPU and MIG instance, ``idle`` what each held when this object was opened, or why that
    is not known.
    """

    def __init__(self, api: Any, unavailable: str | None) -> None:
        self._api = api
        self.unavailable = unavailable
        self.driver: str | None = None
        self.devices: list[Device] = []
        self.idle: dict[str, Idle | NvmlError] = {}

    @classmethod
    def open(cls, api: Any = None) -> Nvml:
        """Open NVML and take the idle baselines. Never raises: ``unavailable`` tells why there is none.

        Args:
            api: A fake for tests; None for the real library.
        """
        if api is None:
            api = importlib.import_module("pynvml")
        try:
            call(api, "nvmlInit")
        except NvmlError as error:
            return cls(api, error.reason)
        nvml = cls(api, None)
        try:
            nvml.driver = _text(call(api, "nvmlSystemGetDriverVersion"))
            for index in range(int(call(api, "nvmlDeviceGetCount"))):
                nvml._add_gpu(index)
        except NvmlError as error:
            nvml.unavailable = error.reason
        if not nvml.devices and nvml.unavailable is None:
            nvml.unavailable = "NVML sees no device it may read"
        return nvml

    def _add_gpu(self, index: int) -> None:
        try:
            handle = call(self._api, "nvmlDeviceGetHandleByIndex", index)
            gpu = Device(self._api, handle, index)
        except NvmlError as error:
            if error.code in ("NO_PERMISSION", "GPU_IS_LOST", "OPERATING_SYSTEM"):
                return  # not ours to use: a container sees the number of all GPUs but may open only its own
            raise
        self.devices.append(gpu)
        self.devices += _mig_instances(self._api, handle, gpu.uuid)
        for device in self.devices:
            if device.uuid not in self.idle:
                self.idle[device.uuid] = _idle(device)

    def find(self, uuid: str) -> Device:
        """The device with exactly this UUID. Raises NvmlError when it is not there."""
        for device in self.devices:
            if device.uuid == uuid:
                return device
        raise NvmlError("NO_DEVICE", self.unavailable or f"NVML knows no device {uuid}")

    def select(self, ordinal: int, cuda_uuid: str | None, environ: Mapping[str, str]) -> Device:
        """The device that CUDA calls ``ordinal``, by its UUID; see ``visible.choose``. Raises NvmlError."""
        if self.unavailable is not None:
            raise NvmlError("UNAVAILABLE", self.unavailable)
        try:
            return self.find(choose([device.known for device in self.devices], ordinal, cuda_uuid, environ))
        except LookupError as error:
            raise NvmlError("NO_DEVICE", str(error)) from None

    def close(self) -> None:
        """Release NVML; a device that was lost meanwhile is no error."""
        if self.unavailable is None:
            try:
                call(self._api, "nvmlShutdown")
            except NvmlError:
                return


def call(api: Any, function: str, *args: Any, **kwargs: Any) -> Any:
    """Call one NVML function; its error code becomes an NvmlError with the reason in words."""
    try:
        return getattr(api, function)(*args, **kwargs)
    except api.NVMLError as error:
        code = _code(api, error.value)
        raise NvmlError(code, f"{REASONS.get(code, 'an error unknown to this version')} (NVML: {code})") from None


def _code(api: Any, value: int) -> str:
    return next((name for name in REASONS if getattr(api, f"NVML_ERROR_{name}", None) == value), f"ERROR_{value}")


def _mig_instances(api: Any, handle: Any, parent: str) -> list[Device]:
    try:
        if not call(api, "nvmlDeviceGetMigMode", handle)[0]:
            return []
        count = int(call(api, "nvmlDeviceGetMaxMigDeviceCount", handle))
    except NvmlError:
        return []  # a GPU that knows no MIG
    found = []
    for index in range(count):
        try:
            instance = call(api, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            found.append(Device(api, instance, None, parent))
        except NvmlError:
            continue  # the numbers of instances have gaps
    return found


def _idle(device: Device) -> Idle | NvmlError:
    try:
        memory = device.memory()
    except NvmlError as error:
        return error
    return Idle(memory=memory, processes=_or_none(lambda: len(device.processes())), cuda_had_started=_cuda_started())


def _or_none(ask: Callable[[], int]) -> int | None:
    try:
        return ask()
    except NvmlError:
        return None


def _cuda_started() -> bool:
    """Whether this process already holds a CUDA context; asks torch only where it is loaded anyway."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
