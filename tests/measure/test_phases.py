"""Phases: one timeline without holes, training apart from the rest, peaks where they belong."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import numpy as np
import pytest
from fake_nvml import GIB, FakeGpu, fake_nvml

from tpme.bench.measure import phases as module
from tpme.bench.measure.nvml import Nvml
from tpme.bench.measure.phases import PhaseLog, measuring
from tpme.bench.record import Phase, Reading

pytestmark = pytest.mark.alone
MIB = 1 << 20


def cpu_log() -> PhaseLog:
    log = PhaseLog("cpu", None, None)
    log.baseline()
    return log


def seconds(phases: list[Phase]) -> float:
    return sum(phase.wall_s for phase in phases)


def test_the_times_of_a_cell_add_up_to_its_wall_time() -> None:
    start = time.perf_counter()
    with measuring("cpu") as log:
        log.baseline()
        with log.phase("load"):
            time.sleep(0.05)
        time.sleep(0.1)  # bookkeeping
        for epoch in range(3):
            with log.phase("train", f"epoch {epoch}"):
                time.sleep(0.1)
            time.sleep(0.03)
            with log.phase("validate"):
                time.sleep(0.02)
            time.sleep(0.02)
        with log.phase("rank"):
            time.sleep(0.02)
        time.sleep(0.05)
        wall_s = log.finish()
    assert seconds(log.phases) == pytest.approx(wall_s, rel=0.01)
    assert seconds(log.phases) == pytest.approx(time.perf_counter() - start, rel=0.2)
    for before, after in zip(log.phases, log.phases[1:], strict=False):
        assert before.start_s + before.wall_s == pytest.approx(after.start_s, abs=1e-9)
    assert log.phases[0].start_s == 0.0


def test_what_lies_between_two_phases_is_never_training() -> None:
    log = cpu_log()
    with log.phase("load"):
        pass
    time.sleep(0.3)
    with log.phase("train"):
        time.sleep(0.01)
    trained = log.phases[-1].wall_s
    time.sleep(0.3)
    with log.phase("validate"):
        time.sleep(0.01)
    load, train, validate = log.phases
    assert load.wall_s > 0.3
    assert validate.wall_s > 0.3
    assert train.wall_s == trained < 0.3


def test_phases_do_not_nest() -> None:
    log = cpu_log()
    with pytest.raises(RuntimeError, match="while 'load' is open"), log.phase("load"), log.phase("train"):
        pass
    with log.phase("train"):
        pass
    assert [phase.kind for phase in log.phases] == ["load", "train"]


def test_a_phase_that_fails_is_recorded() -> None:
    log = cpu_log()
    with pytest.raises(MemoryError), log.phase("train", "epoch 1"):
        raise MemoryError
    assert [(phase.kind, phase.name) for phase in log.phases] == [("train", "epoch 1")]
    assert log.phases[0].memory.host_rss_bytes.value is not None


def test_a_failure_is_not_hidden_by_what_a_broken_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    log = cpu_log()

    def broken(device: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(MemoryError), log.phase("train"):  # noqa: PT012
        monkeypatch.setattr(module, "sync", broken)
        raise MemoryError
    assert len(log.phases) == 1


def test_host_memory_is_over_the_baseline_and_per_phase() -> None:
    log = cpu_log()
    for kind, mib in (("load", 50), ("train", 200), ("train", 100), ("validate", 300)):
        with log.phase(kind):  # type: ignore[arg-type]
            block = bytearray(b"x") * (mib * MIB)
            del block
    peaks = [phase.memory.host_rss_bytes.value for phase in log.phases]
    # The second training phase has what the first one freed; every other phase starts without.
    for peak, mib in zip(peaks, (50, 200, 200, 300), strict=True):
        assert peak == pytest.approx(mib * MIB, abs=25 * MIB)
    assert log.training_memory().host_rss_bytes.value == peaks[1]
    assert "over the baseline" in log.phases[0].memory.host_rss_bytes.source


def test_without_a_baseline_host_memory_is_missing() -> None:
    log = PhaseLog("cpu", None, None)
    with log.phase("train"):
        pass
    assert log.phases[0].memory.host_rss_bytes.value is None
    assert "baseline" in str(log.phases[0].memory.host_rss_bytes.reason)


def test_on_a_cpu_what_a_gpu_would_tell_is_missing_with_that_reason() -> None:
    log = cpu_log()
    with log.phase("train"):
        pass
    memory = log.phases[0].memory
    for reading in (
        memory.torch_allocated_bytes,
        memory.torch_reserved_bytes,
        memory.nvml_device_bytes,
        memory.nvml_process_bytes,
        log.phases[0].energy_j,
        log.training_memory().nvml_device_bytes,
    ):
        assert (reading.value, reading.reason) == (None, "no CUDA device")
    assert log.flags()[0].code == "cpu-memory"


def with_held(log: PhaseLog, monkeypatch: pytest.MonkeyPatch, *held: tuple[int, int]) -> list[str]:
    """Let ``log`` find these (host, device) bytes at the begin and end of its phases; returns what it released."""
    released: list[str] = []
    values = iter(held)
    monkeypatch.setattr(module, "release_free_memory", lambda: released.append("host"))
    monkeypatch.setattr(module, "release_cached", lambda device: released.append("device"))
    monkeypatch.setattr(PhaseLog, "_held", lambda self: next(values))
    return released


def test_training_hands_back_only_what_others_left(monkeypatch: pytest.MonkeyPatch) -> None:
    log = cpu_log()
    # begin, end of: the first of its kind; one that finds its own leftovers; one that finds more than those
    released = with_held(log, monkeypatch, (500, 0), (500, 0), (500, 0), (500, 0), (750, 0), (500, 0))
    seen = []
    for _ in range(3):
        with log.phase("train"):
            pass
        seen.append(len(released))
    assert seen == [2, 2, 4]
    assert all(phase.memory.host_rss_bytes.valid for phase in log.phases)


def test_other_phases_that_begin_with_leftovers_are_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    log = cpu_log()
    held = [(mib * MIB, 0) for mib in (900, 900, 900, 500, 605, 707)]  # begin and end; none at a doubted end
    released = with_held(log, monkeypatch, *held)
    with log.phase("train"):
        pass
    for _ in range(3):
        with log.phase("validate"):
            pass
    first, second, third = (phase.memory.host_rss_bytes for phase in log.phases[1:])
    assert released == ["host", "device"] * 2 + ["host"] * 2, "a process keeps what training freed"
    assert first.valid
    assert second.value is not None
    assert not second.valid
    assert "up to 100 MiB" in str(second.reason)
    assert "up to 202 MiB" in str(third.reason), "measured against the last undoubted one"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to hand free memory back")
@pytest.mark.parametrize("hands_back", [True, False])
def test_memory_that_loading_freed_is_not_charged_to_training(
    monkeypatch: pytest.MonkeyPatch, hands_back: bool
) -> None:
    """200 MiB that the C allocator keeps, below one block that pins them: with and without what prevents it."""
    if not hands_back:
        monkeypatch.setattr(module, "release_free_memory", lambda: None)
    log = cpu_log()
    log.baseline()
    with log.phase("load"):
        blocks = [b"x" * 50_000 for _ in range(4 * 1024)]
        pin = blocks.pop()
        del blocks
    with log.phase("train"):
        assert pin
    load, train = (phase.memory.host_rss_bytes.value for phase in log.phases)
    assert load is not None
    assert train is not None
    assert load > 150 * MIB
    assert (train < 50 * MIB) == hands_back


def test_before_training_every_phase_starts_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    log = cpu_log()
    released = with_held(log, monkeypatch, (1, 0), (5, 0), (9, 0), (9, 0))
    for name in ("data", "encoders"):
        with log.phase("load", name):
            pass
    assert released == ["host", "device"] * 2


def test_a_training_peak_is_valid_only_if_every_training_phase_was_read() -> None:
    log = cpu_log()
    for _ in range(2):
        with log.phase("train"):
            pass
    memory = log.phases[0].memory
    read = memory.model_copy(update={"nvml_device_bytes": Reading(value=5.0, source="NVML")})
    log.phases[0] = log.phases[0].model_copy(update={"memory": read})
    largest = log.training_memory().nvml_device_bytes
    assert (largest.value, largest.valid) == (5.0, False)
    assert "1 of 2 training phases" in str(largest.reason)


def test_no_training_is_no_training_memory() -> None:
    log = cpu_log()
    with log.phase("rank"):
        pass
    assert "no training phase" in str(log.training_memory().host_rss_bytes.reason)


def test_all_instruments_stop_when_the_cell_fails() -> None:
    with pytest.raises(ZeroDivisionError), measuring("cpu") as log:  # noqa: PT012
        assert log._sampler is not None
        pid = log._sampler.pid
        raise ZeroDivisionError
    assert log.samples is not None
    assert not Path(f"/proc/{pid}").exists()


def test_the_samplers_cost_and_curve_come_with_the_log() -> None:
    with measuring("cpu") as log:
        log.baseline()
        with log.phase("train"):
            time.sleep(0.2)
    assert log.samples is not None
    assert log.samples.t_s[0] > 0
    assert log.counters()["sampler_core_share"].value == log.samples.cpu_fraction
    train = log.phases[0]
    inside = (log.samples.t_s >= train.start_s) & (log.samples.t_s <= train.start_s + train.wall_s)
    assert inside.sum() > 3


def test_a_crowded_machine_is_flagged_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    log = cpu_log()
    monkeypatch.setattr(module.CoreWait, "waited_s", lambda self: 0.02)
    with log.phase("train"):
        time.sleep(0.1)
    with log.phase("validate"):
        pass
    assert 0.1 < (log.counters()["core_wait_fraction"].value or 0.0) <= 0.2
    assert [flag.code for flag in log.flags()] == ["cpu-memory", "crowded"]


# --- on a pretended GPU ------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A fake GPU that PhaseLog takes for CUDA device 0; torch holds 1 GiB on it."""
    reading = Reading(value=GIB, source="torch")
    monkeypatch.setattr(module, "select_gpu", lambda nvml, device: nvml.devices[0])
    monkeypatch.setattr(module, "now", lambda device: time.perf_counter())
    monkeypatch.setattr(module, "sync", lambda device: None)
    monkeypatch.setattr(module, "peaks", lambda device: (reading, reading))
    for name in ("reset_peaks", "release_cached"):
        monkeypatch.setattr(module, name, lambda device: None)
    monkeypatch.setattr(module, "reserved_bytes", lambda device: 0)
    monkeypatch.setattr(module.CoreWait, "waited_s", lambda self: 0.0)
    return FakeGpu(used=GIB // 100)


def train_on(gpu: FakeGpu, log: PhaseLog, name: str = "") -> None:
    with log.phase("train", name):
        gpu.used, gpu.processes = gpu.used + 2 * GIB, {os.getpid(): 2 * GIB}
        gpu.energy_mj += 30_000
        time.sleep(0.15)


def test_a_phase_on_a_gpu(gpu: FakeGpu) -> None:
    log = PhaseLog("cuda", None, Nvml.open(fake_nvml(gpu)))
    train_on(gpu, log)
    phase = log.phases[0]
    assert phase.memory.nvml_device_bytes.value == 2 * GIB
    assert phase.memory.nvml_process_bytes.value == 2 * GIB
    assert phase.memory.torch_reserved_bytes.value == GIB
    assert phase.energy_j.value == 30.0
    assert log.flags() == []
    assert log.counters()["gpu_temperature_c"].value is None


def test_strangers_and_a_busy_start_are_flagged(gpu: FakeGpu) -> None:
    gpu.used, gpu.processes = GIB, {10**9: GIB}
    log = PhaseLog("cuda", None, Nvml.open(fake_nvml(gpu)))
    with log.phase("train"):
        gpu.processes = gpu.processes | {os.getpid(): GIB}
    messages = [flag.message for flag in log.flags() if flag.code == "foreign-process"]
    assert len(messages) == 2
    assert "before this run" in messages[0]
    assert "up to 1 other processes used the GPU while training (train)" in messages[1]


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [(None, "not opened"), (Nvml.open(fake_nvml(errors={"nvmlInit": "NO_PERMISSION"})), "Permissions")],
)
def test_a_gpu_without_nvml_still_runs_and_says_why(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, nvml: Nvml | None, reason: str
) -> None:
    monkeypatch.setattr(module, "select_gpu", lambda nvml, device: nvml.select(0, None, {}))
    log = PhaseLog("cuda", None, nvml)
    train_on(gpu, log)
    assert reason in str(log.phases[0].memory.nvml_device_bytes.reason)
    assert reason in str(log.phases[0].energy_j.reason)
    assert log.phases[0].memory.torch_allocated_bytes.value == GIB
    assert [flag.code for flag in log.flags()] == ["no-nvml"]


def test_throttling_while_training_is_flagged(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    log = PhaseLog("cuda", None, Nvml.open(fake_nvml(gpu)))
    ends = module.GpuWindow.end
    rows = {"t_s": np.zeros(4), "clock_limits": np.array([0x4, 0x4, 0x4, 0.0]), "temperature_c": np.full(4, 70.0)}
    monkeypatch.setattr(
        module.GpuWindow,
        "end",
        lambda self, wall_s, _, floor: ends(self, wall_s, rows if len(log.phases) == 1 else {}, floor),
    )
    for epoch in (1, 2, 3):
        train_on(gpu, log, f"epoch {epoch}")
    (flag,) = log.flags()
    assert flag.code == "throttled"
    assert "while training (epoch 2)" in flag.message
    assert len(log.phases) == 3, "named, never dropped"
    assert "power cap in 75% of readings" in flag.message
    assert log.counters()["gpu_temperature_c"].value == 70.0
    states = [phase.gpu for phase in log.phases]
    assert [state and (state.temperature_c, state.throttled) for state in states] == [
        (None, {}),
        (70.0, {"power cap": 0.75}),
        (None, {}),
    ], "every phase keeps the state of the GPU in it"
