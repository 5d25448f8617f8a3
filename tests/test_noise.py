"""The noise floor of a device: equal runs, their spread, and its way into later records and the gate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tpme.bench.commands import noise
from tpme.bench.commands.noise import MATRIX, measure_noise, overhead_ratio
from tpme.bench.counting.devices import DeviceNoise, known_profile
from tpme.bench.errors import UserError
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.run.cell import CellRun
from tpme.bench.run.launch import make_jobs

NAMES = ("noise_time_ratio", "noise_memory_ratio", "overhead_ratio")


@pytest.fixture
def measured(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeviceNoise:
    """Three runs of a small cell, measured into a store of this test's own."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setattr(noise, "RUNS", 3)
    monkeypatch.setattr(noise, "overhead_ratio", lambda trainer: 0.004)
    return measure_noise("cpu", tmp_path / "store", Console(quiet=True), world.matrix(["id"], training={"epochs": 3}))


def test_it_is_stored_with_the_device_and_copied_to_later_records(
    world: Any, measured: DeviceNoise, tmp_path: Path
) -> None:
    assert measured.noise_time_ratio > 0
    assert measured.noise_memory_ratio >= 0
    assert "3 A/A runs" in measured.source
    assert "95% quantile of 3 pairs" in measured.source
    matrix = world.matrix(["popularity"])
    later = world.tell(matrix, tmp_path / "later", store=tmp_path / "store")
    assert {name: later.counters[name].value for name in NAMES} == {name: getattr(measured, name) for name in NAMES}
    profile = known_profile(later.environment.device_key, tmp_path / "store")
    assert profile is not None
    assert profile.noise == measured
    assert profile.rate("fp32") > 0, "calibrated on the way"
    never = world.tell(matrix, tmp_path / "never", store=tmp_path / "another")
    assert [never.counters[name].value for name in NAMES] == [None] * 3
    assert "tpme doctor --noise" in never.counters["noise_time_ratio"].reason


def test_a_cell_that_fails_is_no_noise_floor(world: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the noise floor cannot be measured: diverged, the loss is not finite"):
        measure_noise("cpu", tmp_path, Console(quiet=True), world.matrix(["id"], lr={"recommender": 1e30}))
    assert not (tmp_path / "devices").exists()


@pytest.mark.alone
def test_overhead_is_what_the_harness_adds(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.job(world.matrix(["fft"]), tmp_path)
    trainer = CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None).prepare()
    plain = overhead_ratio(trainer, rounds=3)
    check, step = trainer._check, trainer.step

    def slow_step(*arguments: Any) -> Any:
        time.sleep(0.03)
        return step(*arguments)

    monkeypatch.setattr(trainer, "step", slow_step)
    in_steps = overhead_ratio(trainer, rounds=3)
    monkeypatch.setattr(trainer, "step", step)
    monkeypatch.setattr(trainer, "_check", lambda *arguments: time.sleep(0.1) or check(*arguments))
    around_them = overhead_ratio(trainer, rounds=3)
    assert min(in_steps, around_them) > plain + 0.5 * abs(plain)
    assert min(in_steps, around_them) > 0.1


def test_the_cell_of_the_noise_floor_can_be_planned(tmp_path: Path) -> None:
    [job] = make_jobs(MATRIX, tmp_path, tmp_path, device="cpu", console=Console(quiet=True))
    assert job.cell.training.epochs > 2, "or the first one, which warms up, would count"
