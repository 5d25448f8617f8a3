"""The capabilities of a device: from its datasheet, or measured once on this machine and stored.

A profile turns exact counters into expected times (``tpme plan``) and measured times into a share of what the device
reaches in plain matrix products (MFU).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import Field, Strict, ValidationError

from tpme.bench.errors import UserError, first_problem
from tpme.bench.limits import Bytes, Positive
from tpme.bench.names import Line
from tpme.bench.parsing import read_toml
from tpme.bench.record import Environment, Frozen, Precision, Reading
from tpme.bench.writing import write_atomically

EFFICIENCY_OF_DATASHEET, EFFICIENCY_OF_MEASURED = 0.5, 0.75
"""Share of the stated rates that the operators of a training step are expected to reach: a datasheet states a bound
that no kernel reaches, a measured profile the rate of one large product."""
_LONGEST_MATMUL_S, _SMALLEST, _LARGEST = 0.1, 1024, 8192
_COPY_BYTES, _CALLS, _REPEAT_S = 128 << 20, 3, 0.05


class DeviceNoise(Frozen):
    """Results of ``tpme doctor --noise`` on a device; ratios, 0.03 is 3 %."""

    RATIOS: ClassVar = ("noise_time_ratio", "noise_memory_ratio", "overhead_ratio")

    noise_time_ratio: float
    """Difference between the median step times of two runs of the same cell."""
    noise_memory_ratio: float
    """Difference between their peaks."""
    overhead_ratio: float
    """Time that the harness adds to an epoch of a bare loop over the same model and batches."""
    source: str


class DeviceProfile(Frozen):
    """Rates and size of one device. The file of ``--device-profile`` has these fields (TOML).

    Leave out a half precision without hardware units; it then counts as being as fast as fp32.
    """

    name: Line
    source: Line
    """``vendor datasheet``, or how it was measured."""
    matmul_flop_per_s: dict[Precision, Positive]
    """Dense matrix products, 1 multiply-add = 2 FLOPs, half precision accumulated in fp32, no TF32."""
    memory_bytes_per_s: Positive
    memory_bytes: Bytes
    efficiency: Positive = Field(default=EFFICIENCY_OF_DATASHEET, le=1)
    """Share of both rates that the operators of a training step are expected to reach."""
    operator_s: Positive = 6e-6
    """Time in which the host starts one operator; it bounds a step of many small ones."""
    workspace_bytes: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = 0
    """Memory that the matrix library takes from torch's allocator besides all tensors."""
    noise: DeviceNoise | None = None

    def rate(self, precision: Precision) -> float:
        """Peak FLOP/s of matrix products in ``precision``."""
        rates = self.matmul_flop_per_s
        return rates.get(precision, rates["fp32"])


def _gpu(name: str, half: float, single: float, bandwidth: float, memory: float, workspace: int) -> DeviceProfile:
    return DeviceProfile(
        name=name,
        source="vendor datasheet",
        matmul_flop_per_s={"fp32": single * 1e12, "bf16": half * 1e12, "fp16": half * 1e12},
        memory_bytes_per_s=bandwidth * 1e12,
        memory_bytes=int(memory * 1e9),
        workspace_bytes=workspace,
    )


# cuBLAS's workspace as torch sets it up: 32 MiB on Hopper, 2 x 4 MiB + 8 x 16 KiB elsewhere.
_HOPPER, _OTHER = 32 << 20, (8 << 20) + (128 << 10)
PROFILES: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        # NVIDIA's datasheets: dense (not sparse) tensor-core rates, fp32 without tensor cores, TB/s, GB.
        _gpu("h200", 989.5, 67.0, 4.8, 141, _HOPPER),
        _gpu("h100", 989.5, 67.0, 3.35, 80, _HOPPER),
        _gpu("a100-80gb", 312.0, 19.5, 2.039, 80, _OTHER),
        _gpu("rtx4090", 165.2, 82.6, 1.008, 24, _OTHER),
        DeviceProfile(
            name="cpu-generic",
            source="assumed: 8 cores with AVX2 at 3 GHz (16 multiply-adds a cycle), 2 x DDR5-4800, 32 GB",
            matmul_flop_per_s={"fp32": 768e9},
            memory_bytes_per_s=76.8e9,
            memory_bytes=32 * 10**9,
        ),
    )
}


def load_profile(name: str, store: Path) -> DeviceProfile:
    """A device profile by name, ``here`` (this machine, measured the first time), or from a TOML file.

    Raises UserError for an unknown name and for a file that is no profile.
    """
    if name in PROFILES:
        return PROFILES[name]
    if name == "here":
        import torch

        return measured_profile("cuda" if torch.cuda.is_available() else "cpu", store)
    path = Path(name)
    try:
        profile = DeviceProfile.model_validate(read_toml(path))
    except FileNotFoundError:
        raise UserError(
            f"device profile '{name}': no such file or profile; profiles: {', '.join(PROFILES)}, here"
        ) from None
    except ValidationError as error:
        first = first_problem(error)
        raise UserError(
            f"{path}: field '{first.field}': {first.message}; its fields are {', '.join(DeviceProfile.model_fields)}"
        ) from None
    if "fp32" not in profile.matmul_flop_per_s:
        raise UserError(f"{path}: field 'matmul_flop_per_s': fp32 is missing; every device has it")
    return profile


def measured_profile(device: str, store: Path) -> DeviceProfile:
    """The profile of a device of this machine, calibrated the first time and then read from the store."""
    from tpme.bench.measure.environment import environment

    key = profile_key(environment(device))
    profile = known_profile(key, store)
    if profile is None:
        profile = calibrate(device, name=key)
        keep_profile(profile, store)
    return profile


def profile_key(environment: Environment) -> str:
    """The key of a device's profile: its ``device_key`` and, on a cluster, the node.

    Nodes share the store, and those of one make differ: in their cooling, their memory, what else runs on them.
    """
    return environment.device_key + (f", node {environment.node}" if environment.node else "")


def known_profile(key: str, store: Path) -> DeviceProfile | None:
    """The stored profile of the device with this ``profile_key``; ``None`` where there is none."""
    try:
        return DeviceProfile.model_validate_json(_file(key, store).read_bytes())
    except (OSError, ValidationError):  # none yet, or one of another version
        return None


def keep_profile(profile: DeviceProfile, store: Path) -> None:
    """Store a measured profile under its name, the device's key."""
    write_atomically(_file(profile.name, store), (profile.model_dump_json(indent=1) + "\n").encode())


def _file(key: str, store: Path) -> Path:
    slug = re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")[:60]
    return store / "devices" / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"


def calibrate(device: str, name: str | None = None) -> DeviceProfile:
    """Measure the rates of ``device`` (under three seconds): square matrix products of each precision, one copy."""
    import psutil
    import torch

    cuda = device.startswith("cuda")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rates: dict[Precision, float] = {
        precision: _matmul_rate(device, dtypes[precision]) for precision in get_args(Precision)
    }
    return DeviceProfile(
        name=name or device,
        source=f"measured by matrix products and a copy, torch {torch.__version__}",
        matmul_flop_per_s=rates,
        memory_bytes_per_s=_copy_rate(device),
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total,
        efficiency=EFFICIENCY_OF_MEASURED,
        workspace_bytes=workspace_bytes(device),
    )


def workspace_bytes(device: str) -> int:
    """Bytes that cuBLAS takes from torch's allocator on ``device``; 0 on a CPU."""
    import torch

    if not device.startswith("cuda"):
        return 0
    return _HOPPER if torch.cuda.get_device_capability(device)[0] == 9 else _OTHER


def _matmul_rate(device: str, dtype: Any) -> float:
    """FLOP/s of the fastest square product; the size doubles until one takes long enough for a precise time."""
    import torch

    best, size = 0.0, 256
    while True:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(partial(torch.matmul, left, right), device)
        best = max(best, 2 * size**3 / seconds)
        if size >= _SMALLEST and (8 * seconds > _LONGEST_MATMUL_S or size == _LARGEST):
            return best
        size *= 2


def _copy_rate(device: str) -> float:
    """Bytes per second of a copy on the device, reads and writes added."""
    import torch

    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _fastest(partial(target.copy_, source), device)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several calls, after an untimed one; short calls are repeated more often."""
    from tpme.bench.measure.clock import now

    work()
    times: list[float] = []
    while len(times) < _CALLS or sum(times) < _REPEAT_S:
        start = now(device)
        work()
        times.append(now(device) - start)
    return min(times)


def mfu(flops: float, step_s: float, profile: DeviceProfile, precision: Precision) -> Reading:
    """Model FLOPs utilisation: FLOPs of a step over its time, as a share of the device's matrix-product rate.

    Args:
        flops: forward and backward. step_s: time of one step, data and update included. profile: of the device that
            it ran on. precision: of its matrix products.
    """
    rate = profile.rate(precision)
    source = (
        f"FLOPs of the canonical step / median step time / {rate / 1e12:.4g} TFLOP/s in {precision} ({profile.name})"
    )
    return Reading(value=flops / step_s / rate, source=source)
