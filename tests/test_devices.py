"""Device profiles: by name, from a file, measured once; and MFU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tpme.bench.counting import devices
from tpme.bench.counting.devices import (
    PROFILES,
    DeviceProfile,
    calibrate,
    known_profile,
    load_profile,
    measured_profile,
    mfu,
    profile_key,
)
from tpme.bench.errors import UserError
from tpme.bench.measure.environment import NODE, environment

SLOW = DeviceProfile(
    name="slow",
    source="test",
    matmul_flop_per_s={"fp32": 1e9, "fp16": 4e9},
    memory_bytes_per_s=1e9,
    memory_bytes=10**9,
)


def test_calibration_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def half_a_second(work: Callable[[], object], device: str) -> float:
        done.append(work())
        return 0.5

    monkeypatch.setattr(devices, "_fastest", half_a_second)
    profile = calibrate("cpu")
    largest = max(tensor.shape[0] for tensor in done if tensor.ndim == 2)
    assert profile.matmul_flop_per_s == dict.fromkeys(("fp32", "bf16", "fp16"), 2 * largest**3 / 0.5)
    assert {tensor.dtype for tensor in done if tensor.ndim == 2} == {torch.float32, torch.bfloat16, torch.float16}
    assert profile.memory_bytes_per_s == 2 * done[-1].nbytes / 0.5
    assert profile.efficiency > PROFILES["h200"].efficiency, "measured rates are nearer to the truth"


def test_calibration_runs_here() -> None:
    profile = calibrate("cpu", name="this one")
    assert profile.name == "this one"
    assert min(profile.matmul_flop_per_s.values()) > 1e7
    assert profile.memory_bytes_per_s > 1e7


def test_a_device_is_calibrated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def once(device: str, name: str | None = None) -> DeviceProfile:
        calls.append(device)
        return SLOW.model_copy(update={"name": name})

    monkeypatch.setattr(devices, "calibrate", once)
    first, second = (measured_profile("cpu", tmp_path) for _ in range(2))
    assert first == second
    assert calls == ["cpu"]
    assert "threads" in first.name
    [file] = (tmp_path / "devices").iterdir()
    file.write_text("{ not a profile")
    assert measured_profile("cpu", tmp_path) == first
    assert calls == ["cpu", "cpu"], "a damaged profile is measured again"


def test_every_node_of_a_cluster_has_a_profile_and_a_noise_floor_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "calibrate", lambda device, name: SLOW.model_copy(update={"name": name}))
    here = environment("cpu")
    names = []
    for node in ("one", "two"):
        monkeypatch.setenv(NODE, node)
        names.append(measured_profile("cpu", tmp_path).name)
        assert known_profile(profile_key(environment("cpu")), tmp_path) is not None
    assert names == [f"{environment('cpu').device_key}, node {node}" for node in ("one", "two")]
    assert len(list((tmp_path / "devices").iterdir())) == 2
    assert known_profile(profile_key(here), tmp_path) is None


def test_mfu_is_work_over_time_over_rate() -> None:
    reading = mfu(2e9, 4.0, SLOW, "fp16")
    assert reading.value == pytest.approx(2e9 / 4.0 / 4e9)
    assert "fp16" in reading.source
    assert mfu(2e9, 4.0, SLOW, "bf16").value == pytest.approx(0.5), "without units of its own: as fast as fp32"


def test_profiles_by_name_state_their_source(tmp_path: Path) -> None:
    assert set(PROFILES) == {"h200", "h100", "a100-80gb", "rtx4090", "cpu-generic"}
    for name, profile in PROFILES.items():
        assert load_profile(name, tmp_path) is profile
        assert ("vendor datasheet" in profile.source) == (name != "cpu-generic")
        assert profile.rate("fp16") >= profile.rate("fp32") > 1e11


def test_a_profile_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nsource = "by hand"\nmemory_bytes = 1000\nmemory_bytes_per_s = 1e9\n'
        "matmul_flop_per_s = { fp32 = 1e9 }\n"
    )
    profile = load_profile(str(path), tmp_path)
    assert (profile.name, profile.rate("bf16")) == ("mine", 1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not a readable TOML file"),
        ('name = "x"\n', "field 'source'"),
        (
            'name = "x"\nsource = "y"\nmemory_bytes = 1\nmemory_bytes_per_s = 1.0\nmatmul_flop_per_s = {fp16 = 1.0}\n',
            "fp32 is missing",
        ),
        ('name = "x"\nbandwidth = 3\n', "field"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_profile(str(path), tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"h300.*h200, h100"):
        load_profile("h300", tmp_path)
