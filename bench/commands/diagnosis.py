"""What this machine has, and how each quantity of a report is measured on it.

Nothing is guessed from a version number: every instrument is tried on a fraction of a second of work. Shown is its
reading, or why it has none.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tpme.bench.counting.devices import DeviceNoise, known_profile, profile_key
from tpme.bench.measure.clock import is_cuda
from tpme.bench.measure.environment import (
    allocator,
    cpu_model,
    cpu_threads,
    environment,
    git_state,
    package_versions,
)
from tpme.bench.measure.nvml import Nvml, NvmlError
from tpme.bench.measure.phases import measuring
from tpme.bench.quantities import memory_reading
from tpme.bench.record import Flag, Frozen, Phase, Reading
from tpme.bench.redact import without_home
from tpme.bench.task.blocked_attention import explain
from tpme.bench.workers import available_cores

TRIAL_S = 0.6
_TRIAL_BYTES = 64 << 20


class GpuInfo(Frozen):
    """One GPU or MIG instance as NVML sees it before CUDA starts."""

    name: str
    uuid: str
    is_mig: bool
    total_bytes: int | None
    used_bytes: int | None
    processes: int | None
    """How many already hold memory on it; None where NVML does not list them."""


class Hub(Frozen):
    """The cache of downloaded encoders."""

    folder: str
    models: tuple[str, ...]
    offline: bool


class Availability(Frozen):
    """Whether and how one quantity is measured on this machine; ``why`` says why its ``state`` is not ``yes``."""

    name: str
    how: str
    state: Literal["yes", "doubtful", "no"]
    why: str | None = None


class Diagnosis(Frozen):
    """Everything that ``tpme doctor`` shows."""

    python: str
    platform: str
    packages: dict[str, str]
    git_revision: str | None
    git_dirty: bool | None
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    allocator: str
    cuda: str
    """Whether torch can compute on a GPU, in words."""
    device: Literal["cpu", "cuda"]
    """Where the instruments were tried: the GPU if there is one."""
    driver: str | None
    nvml: str | None
    """Why NVML cannot be used; None where it can."""
    gpus: tuple[GpuInfo, ...]
    attention: str
    """Which attention encoders get on ``device``, and why."""
    hub: Hub
    quantities: tuple[Availability, ...]
    flags: tuple[Flag, ...]
    noise: DeviceNoise | None
    """Measured on this device once; None if never."""


def diagnose(store: Path) -> Diagnosis:
    """Inspect this machine and try the instruments (about two seconds, more where CUDA must start).

    Args:
        store: where the profiles of devices are.
    """
    import psutil
    import torch

    nvml = Nvml.open()  # before CUDA starts, for its idle baselines
    gpus = tuple(_gpus(nvml))
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    profile = None
    try:
        quantities, flags = try_instruments(device, nvml)
        profile = known_profile(profile_key(environment(device)), store)
    except RuntimeError as error:  # a broken or full GPU
        message = str(error).splitlines()[0]
        quantities, flags = (Availability(name="all", how="a short workload", state="no", why=message),), ()
    nvml.close()
    revision, dirty = git_state()
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=package_versions(),
        git_revision=revision,
        git_dirty=dirty,
        cpu=cpu_model(),
        cores=available_cores(),
        threads=cpu_threads(),
        memory_bytes=psutil.virtual_memory().total,
        allocator=allocator(),
        cuda=_cuda(device),
        device=device,
        driver=nvml.driver,
        nvml=nvml.unavailable,
        gpus=gpus,
        attention=explain(device),
        hub=_hub(),
        quantities=quantities,
        flags=flags,
        noise=profile.noise if profile else None,
    )


def try_instruments(device: str, nvml: Nvml) -> tuple[tuple[Availability, ...], tuple[Flag, ...]]:
    """Measure a short workload on ``device``; returns what each quantity would be measured by, and all warnings."""
    with measuring(device, nvml=nvml) as log:
        log.baseline()
        with log.phase("train", "trial"):
            _work(device)
    sampler = log.counters()["sampler_core_share"]
    return tuple(_quantities(device, log.phases[0], sampler)), tuple(log.flags())


def _work(device: str) -> None:
    import torch

    values = torch.ones(_TRIAL_BYTES // 4, device=device).view(4096, -1)
    end = time.perf_counter() + TRIAL_S
    while time.perf_counter() < end:
        if is_cuda(device):
            values @ values.T
            torch.cuda.synchronize()
        else:
            time.sleep(0.02)


def _quantities(device: str, phase: Phase, sampler: Reading) -> Iterator[Availability]:
    memory = phase.memory
    clock = "wall clock, with the GPU synchronised at both ends" if is_cuda(device) else "wall clock"
    yield Availability(name="T epoch time", how=f"{clock}; median over epochs", state="yes")
    yield Availability(name="P parameters", how="counted from the model: exact, equal everywhere", state="yes")
    kind = "cuda" if is_cuda(device) else "cpu"
    yield _quantity("M memory", memory_reading("memory_bytes", memory, kind))
    if kind == "cuda":
        yield _quantity("M by process", memory.nvml_process_bytes)
        yield _quantity("M by device", memory.nvml_device_bytes)
        yield _quantity("M by torch", memory.torch_allocated_bytes)
        yield _quantity("M on the host", memory.host_rss_bytes)
    else:
        yield _quantity("M on a GPU", memory.nvml_process_bytes)
    yield _quantity("E energy", phase.energy_j)
    yield Availability(name="Quality", how="ranks of the test targets in the full catalogue: exact", state="yes")
    if sampler.value is None:
        yield _quantity("Sampler", sampler)
    else:
        yield Availability(name="Sampler", how=f"its own process, {sampler.value:.2%} of one core", state="yes")


def _quantity(name: str, reading: Reading) -> Availability:
    state: Literal["yes", "doubtful", "no"] = "no" if reading.value is None else "yes" if reading.valid else "doubtful"
    return Availability(name=name, how=reading.source, state=state, why=reading.reason)


def _gpus(nvml: Nvml) -> Iterator[GpuInfo]:
    for device in nvml.devices:
        idle = nvml.idle[device.uuid]
        known = None if isinstance(idle, NvmlError) else idle
        yield GpuInfo(
            name=device.name,
            uuid=device.uuid,
            is_mig=device.is_mig,
            total_bytes=known.memory.total if known else None,
            used_bytes=known.memory.used if known else None,
            processes=known.processes if known else None,
        )


def _cuda(device: str) -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if device == "cpu":
        return f"torch was built for CUDA {torch.version.cuda}, but finds no device"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}: {', '.join(names)}"


def _hub() -> Hub:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    names = sorted(path.name for path in folder.glob("models--*") if any((path / "snapshots").glob("*")))
    models = tuple(name.removeprefix("models--").replace("--", "/", 1) for name in names)
    offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") in ("1", "true")
    return Hub(folder=without_home(str(folder)), models=models, offline=offline)
