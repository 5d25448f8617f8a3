"""Maps a CUDA ordinal to an NVML device.

The two number devices differently: CUDA puts the fastest first and obeys ``CUDA_VISIBLE_DEVICES``; NVML sorts by PCI
address and lists all. Only the UUID is common to both, so a number of one is used for the other only where all devices
are the same model or CUDA_DEVICE_ORDER is PCI_BUS_ID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceIdentity:
    """A device as NVML names it: a GPU (``index`` in PCI order) or a MIG instance (``parent``: its GPU's UUID)."""

    uuid: str
    name: str
    index: int | None = None
    parent: str | None = None


def choose(devices: Sequence[DeviceIdentity], ordinal: int, cuda_uuid: str | None, environ: Mapping[str, str]) -> str:
    """Return the UUID of CUDA device ``ordinal`` in NVML's spelling.

    Args:
        devices: All GPUs and MIG instances.
        ordinal: The CUDA ordinal, an index into ``CUDA_VISIBLE_DEVICES`` where that is set.
        cuda_uuid: The UUID CUDA itself reports, once it has started; None before.
        environ: Read for ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``.

    Raises:
        LookupError: the device is ambiguous or unknown; the message says why.
    """
    if cuda_uuid is None:
        return _instance(devices, _from_environment(devices, ordinal, environ))
    wanted = _plain(cuda_uuid)
    device = next((device for device in devices if _plain(device.uuid) == wanted), None)
    if device is None:
        raise LookupError(f"NVML does not know the CUDA device {cuda_uuid}")
    instances = [other for other in devices if other.parent == device.uuid]
    if len(instances) > 1:
        named = _from_environment(devices, ordinal, environ)
        if named in instances:
            return named.uuid
    return _instance(devices, device)


def _plain(uuid: str) -> str:
    """Drop NVML's prefix ``GPU-`` or ``MIG-``, which torch leaves out."""
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")


def _instance(devices: Sequence[DeviceIdentity], device: DeviceIdentity) -> str:
    """UUID of what CUDA computes on: of a GPU in MIG mode its only instance, else the GPU itself."""
    instances = [other for other in devices if other.parent == device.uuid]
    if len(instances) > 1:
        raise LookupError(f"{device.uuid} is split into {len(instances)} MIG instances; name one of them by its UUID")
    return instances[0].uuid if instances else device.uuid


def _from_environment(devices: Sequence[DeviceIdentity], ordinal: int, environ: Mapping[str, str]) -> DeviceIdentity:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _by_index(devices, ordinal, environ)
    entries = []
    for entry in (part.strip() for part in visible.split(",")):
        if not entry or entry.startswith("-"):
            break  # CUDA ignores everything after the first invalid entry
        entries.append(entry)
    if ordinal >= len(entries):
        raise LookupError(
            f"CUDA_VISIBLE_DEVICES='{visible}' lists {len(entries)} devices; there is no device {ordinal}"
        )
    entry = entries[ordinal]
    if entry.isdigit():
        return _by_index(devices, int(entry), environ)
    matches = [device for device in devices if device.uuid.lower().startswith(entry.lower())]
    if len(matches) != 1:
        raise LookupError(f"CUDA_VISIBLE_DEVICES names '{entry}', which matches {len(matches)} devices")
    return matches[0]


def _by_index(devices: Sequence[DeviceIdentity], index: int, environ: Mapping[str, str]) -> DeviceIdentity:
    gpus = [device for device in devices if device.index is not None]
    if len({gpu.name for gpu in gpus}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise LookupError(
            "GPUs of several models without CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA and NVML may number them differently"
        )
    if (gpu := next((gpu for gpu in gpus if gpu.index == index), None)) is None:
        raise LookupError(f"there is no GPU number {index}: NVML lists {len(gpus)}")
    return gpu
