"""NVIDIA's management library (NVML): the only module that calls pynvml.

Every failure becomes an ``NvmlError`` whose ``reason`` goes into the record; an unknown value is never reported as 0.
Call ``Nvml.open`` before CUDA starts in this process: it reads the memory and the number of processes of every idle
device.

Traps handled here:

* ``used`` of NVML's version 1 memory struct includes what the driver reserves; version 2 reports it separately. The
  version is kept with the value, and differences are only taken between equal versions.
* In a container the process list shows ids of the host, or nothing.
* On a MIG instance energy, clocks and temperature are those of the whole GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpme.bench.measure.visible import DeviceIdentity, choose

THROTTLES: Mapping[str, str] = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal limit",
    "HwThermalSlowdown": "hardware thermal limit",
    "HwPowerBrakeSlowdown": "external power brake",
}
"""Names of the throttle reasons that disturb a measurement (idle and user-set clocks do not)."""


class NvmlError(Exception):
    """A failed NVML query. ``code``: NVML's error name without ``NVML_ERROR_``, or a local code; ``reason``: a text."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a device in bytes; ``version`` 1 counts memory reserved by the driver as used, 2 does not."""

    used: int
    total: int
    version: int


class Device:
    """One GPU or MIG instance. Every query raises NvmlError on failure.

    Args:
        api: The module ``pynvml`` or its fake.
        handle: NVML's handle.
        index: The GPU's NVML index; None for a MIG instance.
        parent: The UUID of a MIG instance's GPU.
    """

    def __init__(self, api: Any, handle: Any, index: int | None, parent: str | None = None) -> None:
        self._api, self._handle = api, handle
        self.uuid = _text(self._query("GetUUID"))
        self.name = _text(self._query("GetName"))
        self.identity = DeviceIdentity(uuid=self.uuid, name=self.name, index=index, parent=parent)
        self.is_mig = parent is not None
        self._memory_version = 2

    def _query(self, query: str, *args: Any, **kwargs: Any) -> Any:
        return call(self._api, f"nvmlDevice{query}", self._handle, *args, **kwargs)

    def memory(self) -> MemoryUse:
        """Device memory, used by all processes together."""
        if self._memory_version == 2:
            try:
                info = self._query("GetMemoryInfo", version=self._api.nvmlMemory_v2)
                return MemoryUse(used=int(info.used), total=int(info.total), version=2)
            except NvmlError as error:
                if error.code not in ("FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH", "NOT_SUPPORTED"):
                    raise
                self._memory_version = 1
        info = self._query("GetMemoryInfo")
        return MemoryUse(used=int(info.used), total=int(info.total), version=1)

    def processes(self) -> dict[int, int | None]:
        """Processes that hold device memory: id, in the PID namespace NVML sees, -> bytes (None where unknown)."""
        bytes_of: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            try:
                listed = self._query(f"Get{kind}RunningProcesses")
            except NvmlError as error:
                if kind == "Compute" or error.code == "GPU_IS_LOST":
                    raise
                continue  # data-centre devices and MIG instances list no graphics processes
            for process in listed:
                used = process.usedGpuMemory
                bytes_of[int(process.pid)] = None if used is None else int(used)
        return bytes_of

    def utilisation_percent(self) -> float:
        """Share of the last sample period in which any kernel ran, however few multiprocessors it used."""
        return float(self._query("GetUtilizationRates").gpu)

    def temperature_c(self) -> float:
        """Core temperature."""
        return float(self._query("GetTemperature", self._api.NVML_TEMPERATURE_GPU))

    def sm_clock_mhz(self) -> float:
        """Current clock of the multiprocessors."""
        return float(self._query("GetClockInfo", self._api.NVML_CLOCK_SM))

    def clock_limits(self) -> int:
        """Bit mask of the current throttle reasons; ``throttles`` names them."""
        try:
            return int(self._query("GetCurrentClocksEventReasons"))
        except NvmlError as error:
            if error.code != "FUNCTION_NOT_FOUND":
                raise
            return int(self._query("GetCurrentClocksThrottleReasons"))  # the same query in drivers before 535

    def throttles(self, mask: int) -> list[str]:
        """Names of the disturbing reasons in a mask of ``clock_limits``."""
        return [
            label for name, label in THROTTLES.items() if mask & getattr(self._api, f"nvmlClocksThrottleReason{name}")
        ]

    def energy_j(self) -> float:
        """Joules since the driver was loaded, from the hardware counter (updated about ten times a second)."""
        if self.is_mig:
            raise NvmlError("MIG", "the energy counter covers the whole GPU, not one MIG instance")
        return float(self._query("GetTotalEnergyConsumption")) / 1000.0


@dataclass(frozen=True)
class Idle:
    """A device before CUDA started in this process: memory in use and processes already running."""

    memory: MemoryUse
    processes: int | None
    """Their number; None where NVML does not list them."""
    cuda_had_started: bool


class Nvml:
    """An NVML session; ``unavailable`` holds the reason where NVML could not be opened.

    ``devices`` lists every GPU and MIG instance; ``idle`` holds the state of each on opening, or the error of reading
    it.
    """

    def __init__(self, api: Any, unavailable: str | None) -> None:
        self._api = api
        self.unavailable = unavailable
        self.driver: str | None = None
        self.devices: list[Device] = []
        self.idle: dict[str, Idle | NvmlError] = {}

    @classmethod
    def open(cls, api: Any = None) -> Nvml:
        """Open NVML and read the idle baselines. Never raises: a failure sets ``unavailable``.

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
            nvml.unavailable = "NVML lists no device that this process may read"
        return nvml

    def _add_gpu(self, index: int) -> None:
        try:
            handle = call(self._api, "nvmlDeviceGetHandleByIndex", index)
            gpu = Device(self._api, handle, index)
        except NvmlError as error:
            if error.code in ("NO_PERMISSION", "GPU_IS_LOST", "OPERATING_SYSTEM"):
                return  # a container counts all GPUs of the host but may open only its own
            raise
        self.devices.append(gpu)
        self.devices += _mig_instances(self._api, handle, gpu.uuid)
        for device in self.devices:
            if device.uuid not in self.idle:
                self.idle[device.uuid] = _idle(device)

    def find(self, uuid: str) -> Device:
        """The device with exactly this UUID. Raises NvmlError where there is none."""
        for device in self.devices:
            if device.uuid == uuid:
                return device
        raise NvmlError("NO_DEVICE", self.unavailable or f"NVML knows no device {uuid}")

    def select(self, ordinal: int, cuda_uuid: str | None, environ: Mapping[str, str]) -> Device:
        """The CUDA device ``ordinal``, matched by UUID; see ``visible.choose``. Raises NvmlError."""
        if self.unavailable is not None:
            raise NvmlError("UNAVAILABLE", self.unavailable)
        try:
            return self.find(choose([device.identity for device in self.devices], ordinal, cuda_uuid, environ))
        except LookupError as error:
            raise NvmlError("NO_DEVICE", str(error)) from None

    def close(self) -> None:
        """Shut NVML down; errors, as of a lost device, are ignored."""
        if self.unavailable is None:
            try:
                call(self._api, "nvmlShutdown")
            except NvmlError:
                return


def call(api: Any, function: str, *args: Any, **kwargs: Any) -> Any:
    """Call one NVML function; its failure becomes an NvmlError with pynvml's message and the code's name."""
    try:
        return getattr(api, function)(*args, **kwargs)
    except api.NVMLError as error:
        code = _code(api, error.value)
        raise NvmlError(code, f"{error} (NVML: {code})") from None


def _code(api: Any, value: int) -> str:
    names = (name for name, code in vars(api).items() if name.startswith("NVML_ERROR_") and code == value)
    return next(names, f"ERROR_{value}").removeprefix("NVML_ERROR_")


def _mig_instances(api: Any, handle: Any, parent: str) -> list[Device]:
    try:
        if not call(api, "nvmlDeviceGetMigMode", handle)[0]:
            return []
        count = int(call(api, "nvmlDeviceGetMaxMigDeviceCount", handle))
    except NvmlError:
        return []  # a GPU without MIG
    instances = []
    for index in range(count):
        try:
            instance = call(api, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            instances.append(Device(api, instance, None, parent))
        except NvmlError:
            continue  # instance numbers have gaps
    return instances


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
    """Whether this process already holds a CUDA context; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
