"""NVML through its fake: every failure is a reason in words, and nothing unknown is ever 0."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest
from fake_nvml import GIB, FakeGpu, fake_nvml

from tpme.bench.measure.nvml import THROTTLES, Idle, Nvml, NvmlError

CODES = sorted(name.removeprefix("NVML_ERROR_") for name in dir(pynvml) if name.startswith("NVML_ERROR_"))


def opened(*gpus: FakeGpu, **settings: Any) -> Nvml:
    return Nvml.open(fake_nvml(*gpus, **settings))


def idle(nvml: Nvml) -> Idle:
    state = nvml.idle[nvml.devices[0].uuid]
    assert isinstance(state, Idle)
    return state


def test_every_throttle_reason_is_a_constant_of_pynvml() -> None:
    for name in THROTTLES:
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") > 0


@pytest.mark.parametrize("code", CODES)
def test_each_error_code_becomes_pynvmls_message_with_its_name(code: str) -> None:
    nvml = opened(errors={"nvmlInit": code})
    assert nvml.unavailable is not None
    message = str(pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}")))
    assert nvml.unavailable == f"{message} (NVML: {code})"
    assert nvml.devices == []
    with pytest.raises(NvmlError) as caught:
        nvml.select(0, None, {})
    assert caught.value.reason == nvml.unavailable


def test_the_fake_refuses_what_pynvml_does_not_have() -> None:
    api = fake_nvml(FakeGpu())
    with pytest.raises(AttributeError):
        _ = api.nvmlDeviceGetMemoryInformation
    with pytest.raises(TypeError):
        api.nvmlDeviceGetTemperature("handle")


def test_without_a_driver_nvml_says_so_and_does_not_raise() -> None:
    nvml = opened(errors={"nvmlInit": "LIBRARY_NOT_FOUND"})
    assert nvml.unavailable is not None
    assert "Shared Library Not Found" in nvml.unavailable
    nvml.close()


def test_a_healthy_gpu_answers_in_our_units() -> None:
    gpu = FakeGpu(used=2 * GIB, energy_mj=1500, temperature=61, sm_clock=1755, utilisation=97, processes={7: 5})
    device = opened(gpu).devices[0]
    assert (device.memory().used, device.memory().version) == (2 * GIB, 2)
    assert device.energy_j() == 1.5
    assert device.temperature_c() == 61
    assert device.sm_clock_mhz() == 1755
    assert device.utilisation_percent() == 97
    assert device.processes() == {7: 5}


def test_the_idle_baseline_is_taken_on_opening() -> None:
    gpu = FakeGpu(used=3 * GIB, processes={99: GIB})
    nvml = opened(gpu)
    gpu.used, gpu.processes = 9 * GIB, {}
    assert idle(nvml).memory.used == 3 * GIB
    assert idle(nvml).processes == 1


def test_a_cuda_context_before_the_baseline_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert not idle(opened(FakeGpu())).cuda_had_started
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert idle(opened(FakeGpu())).cuda_had_started


def test_without_the_second_memory_struct_the_first_is_used_and_named() -> None:
    gpu = FakeGpu(used=2 * GIB, reserved=GIB, has_v2=False)
    info = opened(gpu).devices[0].memory()
    assert (info.used, info.version) == (3 * GIB, 1)


def test_a_lost_device_is_not_mistaken_for_an_old_driver() -> None:
    gpu = FakeGpu()
    device = opened(gpu).devices[0]
    gpu.lost = True
    with pytest.raises(NvmlError, match="lost") as caught:
        device.memory()
    assert caught.value.code == "GPU_IS_LOST"
    with pytest.raises(NvmlError, match="lost"):
        device.processes()
    gpu.lost = False
    assert device.memory().version == 2


def test_gpus_that_may_not_be_opened_are_left_out() -> None:
    barred, own = FakeGpu(uuid="GPU-barred", errors={"nvmlDeviceGetUUID": "NO_PERMISSION"}), FakeGpu()
    assert [device.uuid for device in opened(barred, own).devices] == [own.uuid]
    alone = opened(barred)
    assert alone.unavailable is not None
    assert "no device" in alone.unavailable


def test_a_value_that_may_not_be_read_has_its_reason() -> None:
    gpu = FakeGpu(errors={"nvmlDeviceGetTotalEnergyConsumption": "NO_PERMISSION"})
    with pytest.raises(NvmlError, match="Insufficient Permissions"):
        opened(gpu).devices[0].energy_j()


def test_a_baseline_that_cannot_be_read_is_a_reason_too() -> None:
    nvml = opened(FakeGpu(errors={"nvmlDeviceGetMemoryInfo": "NO_PERMISSION"}))
    assert isinstance(nvml.idle[nvml.devices[0].uuid], NvmlError)


def test_a_process_whose_memory_is_not_told_is_none_not_zero() -> None:
    assert opened(FakeGpu(processes={5: None})).devices[0].processes() == {5: None}


def test_processes_of_a_device_without_graphics_are_still_listed() -> None:
    gpu = FakeGpu(processes={5: 7}, errors={"nvmlDeviceGetGraphicsRunningProcesses": "NOT_SUPPORTED"})
    assert opened(gpu).devices[0].processes() == {5: 7}


def test_mig_instances_are_devices_of_their_own() -> None:
    instances = [FakeGpu(uuid=f"MIG-{n}", used=n * GIB) for n in (1, 2)]
    nvml = opened(FakeGpu(instances=instances))
    assert [device.is_mig for device in nvml.devices] == [False, True, True]
    chosen = nvml.select(0, None, {"CUDA_VISIBLE_DEVICES": "MIG-2"})
    assert chosen.memory().used == 2 * GIB
    with pytest.raises(NvmlError, match="whole GPU"):
        chosen.energy_j()


def test_old_drivers_know_the_clock_limits_by_another_name() -> None:
    gpu = FakeGpu(clock_limits=0x40, errors={"nvmlDeviceGetCurrentClocksEventReasons": "FUNCTION_NOT_FOUND"})
    device = opened(gpu).devices[0]
    assert device.throttles(device.clock_limits()) == ["hardware thermal limit"]


def test_idle_and_user_set_clocks_are_no_throttling() -> None:
    device = opened(FakeGpu()).devices[0]
    assert device.throttles(0x1 | 0x2) == []
    assert device.throttles(0x4 | 0x20) == ["power cap", "software thermal limit"]


def test_selecting_by_uuid_ignores_the_order() -> None:
    first, second = FakeGpu(), FakeGpu(uuid="GPU-99999999-0000-0000-0000-000000000000")
    nvml = opened(first, second)
    assert nvml.select(0, "99999999-0000-0000-0000-000000000000", {}).uuid == second.uuid
    with pytest.raises(NvmlError, match="there is no device 3"):
        nvml.select(3, None, {"CUDA_VISIBLE_DEVICES": "0,1"})
