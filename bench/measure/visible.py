"""Which NVML device a CUDA ordinal is.

The two number devices differently: CUDA puts the fastest first and obeys ``CUDA_VISIBLE_DEVICES``, NVML goes by
PCI address and sees all. Only the UUID is common to both, so nothing here ever takes one number for the other
unless all devices are alike or the order was pinned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """One device NVML knows: a GPU (``index`` in PCI order) or a MIG instance (``parent``: its GPU's UUID)."""

    uuid: str
    name: str
    index: int | None = None
    parent: str | None = None


def choose(devices: Sequence[Known], ordinal: int, cuda_uuid: str | None, environ: Mapping[str, str]) -> str:
    """UUID, as NVML spells it, of CUDA device ``ordinal``.

    Args:
        devices: All GPUs and MIG instances.
        ordinal: The CUDA ordinal, an index into ``CUDA_VISIBLE_DEVICES`` where that is set.
        cuda_uuid: The UUID CUDA itself reports, once it has started; None before.
        environ: Read for ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``.

    Raises:
        LookupError: it cannot be told for sure; the message says why.
    """
    if cuda_uuid is None:
        return _instance(devices, _from_environment(devices, ordinal, environ))
    wanted = _plain(cuda_uuid)
    found = [known for known in devices if _plain(known.uuid) == wanted]
    if not found:
        raise LookupError(f"NVML does not know the CUDA device {cuda_uuid}")
    instances = [known for known in devices if known.parent == found[0].uuid]
    if len(instances) > 1:
        named = _from_environment(devices, ordinal, environ)
        if named in instances:
            return named.uuid
    return _instance(devices, found[0])


def _plain(uuid: str) -> str:
    """Torch leaves out the prefix ``GPU-`` or ``MIG-`` that NVML puts before a UUID."""
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")


def _instance(devices: Sequence[Known], device: Known) -> str:
    """A GPU that is split into MIG instances is not what CUDA computes on: one of its instances is."""
    instances = [known for known in devices if known.parent == device.uuid]
    if len(instances) > 1:
        raise LookupError(f"{device.uuid} is split into {len(instances)} MIG instances; name one of them by its UUID")
    return instances[0].uuid if instances else device.uuid


def _from_environment(devices: Sequence[Known], ordinal: int, environ: Mapping[str, str]) -> Known:
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
            f"CUDA_VISIBLE_DEVICES='{visible}' shows {len(entries)} devices, there is no number {ordinal}"
        )
    entry = entries[ordinal]
    if entry.isdigit():
        return _by_index(devices, int(entry), environ)
    found = [known for known in devices if known.uuid.lower().startswith(entry.lower())]
    if len(found) != 1:
        raise LookupError(f"CUDA_VISIBLE_DEVICES names '{entry}', which matches {len(found)} devices")
    return found[0]


def _by_index(devices: Sequence[Known], index: int, environ: Mapping[str, str]) -> Known:
    gpus = [known for known in devices if known.index is not None]
    if len({known.name for known in gpus}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise LookupError("GPUs of several models and no CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA's numbers are not NVML's")
    for known in gpus:
        if known.index == index:
            return known
    raise LookupError(f"there is no GPU number {index}: NVML knows {len(gpus)}")
