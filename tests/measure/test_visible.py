"""CUDA's device numbers and NVML's: matched by UUID, refused where they could be confused."""

from __future__ import annotations

import pytest

from tpme.bench.measure.visible import DeviceIdentity, choose

A = DeviceIdentity("GPU-aaaaaaaa-0000-0000-0000-000000000001", "NVIDIA X", index=0)
B = DeviceIdentity("GPU-bbbbbbbb-0000-0000-0000-000000000002", "NVIDIA X", index=1)
OTHER = DeviceIdentity("GPU-cccccccc-0000-0000-0000-000000000003", "NVIDIA Y", index=1)
MIG_1 = DeviceIdentity("MIG-dddddddd-0000-0000-0000-000000000004", "NVIDIA X MIG 1g", parent=A.uuid)
MIG_2 = DeviceIdentity("MIG-eeeeeeee-0000-0000-0000-000000000005", "NVIDIA X MIG 1g", parent=A.uuid)


@pytest.mark.parametrize(
    ("visible", "ordinal", "expected"),
    [
        (None, 1, B),
        ("1", 0, B),
        ("1,0", 1, A),
        (B.uuid, 0, B),
        ("GPU-bbbb", 0, B),
        (f"{B.uuid},{A.uuid}", 1, A),
        (" 1 , 0", 0, B),
    ],
)
def test_before_cuda_starts_the_environment_decides(
    visible: str | None, ordinal: int, expected: DeviceIdentity
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert choose([A, B], ordinal, None, environ) == expected.uuid


def test_what_cuda_says_beats_every_number() -> None:
    assert choose([A, B], 0, "bbbbbbbb-0000-0000-0000-000000000002", {"CUDA_VISIBLE_DEVICES": "0"}) == B.uuid
    assert choose([A, OTHER], 0, "cccccccc-0000-0000-0000-000000000003", {}) == OTHER.uuid
    assert choose([A, B], 0, B.uuid.upper(), {}) == B.uuid


def test_numbers_of_unlike_gpus_are_only_trusted_in_pci_order() -> None:
    with pytest.raises(LookupError, match="several models"):
        choose([A, OTHER], 0, None, {})
    assert choose([A, OTHER], 1, None, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == OTHER.uuid


@pytest.mark.parametrize(
    ("visible", "ordinal", "message"),
    [("", 0, "lists 0"), ("0,-1,1", 1, "lists 1"), ("7", 0, "no GPU number 7"), ("GPU-", 0, "matches 2")],
)
def test_what_cannot_be_told_is_refused(visible: str, ordinal: int, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        choose([A, B], ordinal, None, {"CUDA_VISIBLE_DEVICES": visible})


def test_a_uuid_nvml_does_not_know_is_refused() -> None:
    with pytest.raises(LookupError, match="does not know"):
        choose([A, B], 0, "ffffffff-0000-0000-0000-000000000009", {})


def test_a_mig_instance_is_found_by_its_own_uuid() -> None:
    devices = [A, MIG_1, MIG_2, B]
    assert choose(devices, 0, None, {"CUDA_VISIBLE_DEVICES": MIG_2.uuid}) == MIG_2.uuid
    assert choose(devices, 0, MIG_2.uuid.removeprefix("MIG-"), {}) == MIG_2.uuid


def test_where_cuda_names_the_whole_gpu_the_environment_names_the_instance() -> None:
    whole = A.uuid.removeprefix("GPU-")
    assert choose([A, MIG_1, MIG_2], 0, whole, {"CUDA_VISIBLE_DEVICES": MIG_2.uuid}) == MIG_2.uuid
    assert choose([A, MIG_1], 0, whole, {}) == MIG_1.uuid
    with pytest.raises(LookupError, match="2 MIG instances"):
        choose([A, MIG_1, MIG_2], 0, whole, {"CUDA_VISIBLE_DEVICES": "0"})
