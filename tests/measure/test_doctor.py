"""``tpme doctor``: it tries the instruments out and says what cannot be had, with or without a GPU."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from fake_nvml import FakeGpu, fake_nvml
from rich.console import Console
from typer.testing import CliRunner

from tpme.bench.cli import app
from tpme.bench.commands.diagnosis import Availability, Diagnosis, diagnose
from tpme.bench.commands.doctor import render
from tpme.bench.counting.devices import PROFILES, DeviceNoise, keep_profile
from tpme.bench.measure.environment import environment
from tpme.bench.measure.nvml import Nvml
from tpme.bench.task.blocked_attention import explain

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a CUDA device")


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose(Path("no store"))


def test_every_quantity_is_measured_or_says_why_not(diagnosis: Diagnosis) -> None:
    first = [quantity.name.split()[0] for quantity in diagnosis.quantities]
    assert {"T", "P", "M", "E", "Quality", "Sampler"} <= set(first)
    for quantity in diagnosis.quantities:
        assert quantity.how
        assert quantity.state == "yes" or quantity.why


@no_gpu
def test_without_a_gpu_memory_is_the_hosts_and_energy_cannot_be_had(diagnosis: Diagnosis) -> None:
    known = {quantity.name: quantity for quantity in diagnosis.quantities}
    assert diagnosis.device == "cpu"
    assert known["M memory"].state == "yes"
    assert "resident" in known["M memory"].how
    assert (known["E energy"].state, known["E energy"].why) == ("no", "no CUDA device")


def test_it_fits_80_columns(diagnosis: Diagnosis) -> None:
    output = io.StringIO()
    render(diagnosis, Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in output.getvalue()
    assert any(line.startswith("attention") for line in lines)
    for title in ("Software", "Machine", "What is measured on this"):
        assert any(line.startswith(title) for line in lines)
    for quantity in diagnosis.quantities:
        assert any(line.startswith(quantity.name) for line in lines)


def test_the_command_succeeds_and_its_json_is_the_diagnosis() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    diagnosis = Diagnosis.model_validate_json(result.output)
    assert diagnosis.cores >= 1
    assert diagnosis.attention == explain(diagnosis.device)


def test_gpus_are_listed_with_their_state(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (FakeGpu(processes={7: None}), FakeGpu(uuid="GPU-2", errors={"nvmlDeviceGetMemoryInfo": "NO_PERMISSION"}))
    nvml = Nvml.open(fake_nvml(*gpus))
    monkeypatch.setattr(Nvml, "open", lambda: nvml)
    monkeypatch.setattr("tpme.bench.commands.diagnosis.try_instruments", lambda device, nvml: ((), ()))
    found = diagnose(Path())
    assert [gpu.processes for gpu in found.gpus] == [1, None]
    assert found.nvml is None
    output = io.StringIO()
    render(found, Console(file=output, width=80))
    text = " ".join(output.getvalue().split())
    assert "80.0 GiB, 1.0 GiB in use by 1 process" in text
    assert "memory not readable" in text


def test_a_broken_gpu_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: str, nvml: Nvml) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    monkeypatch.setattr("tpme.bench.commands.diagnosis.try_instruments", fail)
    assert diagnose(Path()).quantities == (
        Availability(name="all", how="a short workload", state="no", why="CUDA error: out of memory"),
    )


def test_downloaded_encoders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models--google--vit-base" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models--broken--download").mkdir()
    (tmp_path / "datasets--a--b" / "snapshots" / "abc").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("tpme.bench.commands.diagnosis.try_instruments", lambda device, nvml: ((), ()))
    result = json.loads(diagnose(tmp_path).model_dump_json())
    assert result["hub"]["models"] == ["google/vit-base"]


def test_what_one_pastes_names_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MALLOC_CONF", f"prof_prefix:{tmp_path}/heap")
    monkeypatch.setattr("tpme.bench.commands.diagnosis.try_instruments", lambda device, nvml: ((), ()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{tmp_path}/.cache/hub")
    result = CliRunner().invoke(app, ["doctor"])
    assert "~/.cache/hub" in result.stdout
    assert str(tmp_path) not in result.stdout


def test_the_noise_floor_is_shown_once_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rendered() -> str:
        output = io.StringIO()
        render(diagnose(tmp_path), Console(file=output, width=200))
        return output.getvalue()

    monkeypatch.setattr("tpme.bench.commands.diagnosis.try_instruments", lambda device, nvml: ((), ()))
    assert "not measured yet; run 'tpme doctor --noise'" in rendered()
    key = environment("cuda" if torch.cuda.is_available() else "cpu").device_key
    noise = DeviceNoise(noise_time_ratio=0.031, noise_memory_ratio=0.002, overhead_ratio=0.004, source="6 A/A runs")
    keep_profile(PROFILES["cpu-generic"].model_copy(update={"name": key, "noise": noise}), tmp_path)
    assert "time ±3.1%, memory ±0.2% (6 A/A runs); the harness adds 0.40% to an epoch" in rendered()
