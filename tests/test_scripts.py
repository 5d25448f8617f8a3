"""The scripts that measure: what they keep, what they put into documents, and that a step in parts is a step."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PERFORMANCE = ROOT / "docs" / "lab" / "performance.md"


@pytest.fixture
def scaling(script: Any) -> ModuleType:
    module: ModuleType = script("scaling")
    return module


def line(scaling: ModuleType, point: Any, seconds: float) -> Any:
    return scaling.Measurement(point=point, seconds=seconds, memory_bytes=2**20 * seconds, parts={"step_s": 0.1})


def test_growth_is_an_exponent(scaling: ModuleType) -> None:
    points = [scaling.Point(axis="users", value=v, method="fft", cached=False, device="cpu") for v in (10, 100, 1000)]
    lines = [line(scaling, point, seconds) for point, seconds in zip(points, (1.0, 10.0, 1000.0), strict=True)]
    assert scaling.growth(lines) == [None, pytest.approx(1.0), pytest.approx(2.0)]


def test_an_interrupted_run_continues(scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, document, asked = tmp_path / "points.jsonl", tmp_path / "scaling.md", []
    document.write_text("before\n<!-- users -->\nold\n<!-- /users -->\nafter\n")

    def measured(point: Any, place: Path) -> Any:
        asked.append(point)
        found = line(scaling, point, float(point.value))
        with place.open("a") as file:
            file.write(found.model_dump_json() + "\n")
        return found

    monkeypatch.setattr(scaling, "_in_own_process", measured)
    given = ["--only", "users", "--out", str(out), "--docs", str(document)]
    assert scaling.main(given) == 0
    every = list(scaling.AXES["users"].points("users", "cpu"))
    assert asked == every
    whole = document.read_text()
    assert whole.startswith("before\n<!-- users -->\n![")
    assert whole.endswith("<!-- /users -->\nafter\n")
    assert "old" not in whole
    assert whole.count("| fft | ") == len([point for point in every if point.method == "fft"])
    assert (tmp_path / "scaling" / "users.png").read_bytes().startswith(b"\x89PNG")
    out.write_text("\n".join(out.read_text().splitlines()[:-1]) + '\n{"point": {"axis": "us')  # killed while writing
    asked.clear()
    assert scaling.main(given) == 0
    assert asked == every[-1:]
    assert document.read_text() == whole


def test_a_point_that_fails_is_reported_and_not_stored(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = scaling.Point(axis="users", value=10, method="no-such-method", cached=False, device="cpu")
    monkeypatch.setattr(scaling.Axis, "points", lambda *_: iter([point]))
    assert scaling.main(["--only", "users", "--out", str(tmp_path / "points.jsonl")]) == 1
    assert "unknown method 'no-such-method'" in capsys.readouterr().err
    assert not (tmp_path / "points.jsonl").exists()


@pytest.mark.parametrize("axis", ["batch", "sequence", "depth", "evaluation"])
def test_a_point_is_measured(scaling: ModuleType, axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"users": 30, "items": 40}
    monkeypatch.setitem(scaling.AXES, axis, replace(scaling.AXES[axis], size={"batch": 8} | small))
    value = {"batch": 8, "sequence": 5, "depth": "tiny", "evaluation": 40}[axis]
    method, cached = ("iisan", True) if axis == "depth" else ("id", False)
    found = scaling.measure(scaling.Point(axis=axis, value=value, method=method, cached=cached, device="cpu"))
    assert found.seconds > 0
    assert found.memory_bytes > 0
    wanted = {
        "batch": {"step_s"},
        "sequence": {"step_s", "loss_s"},
        "depth": {"step_s", "flops", "counted_bytes"},
        "evaluation": {"validate_s", "rank_s"},
    }
    assert set(found.parts) == wanted[axis]
    if axis == "batch":
        assert found.seconds == pytest.approx(4 * found.parts["step_s"])  # 30 users, 8 a step
    assert json.loads(found.model_dump_json())["point"]["axis"] == axis


@pytest.mark.parametrize("name", ["lora", "iisan", "iisan (cached)", "id"])
def test_a_step_in_parts_is_a_step(script: Any, name: str, tmp_path: Path) -> None:
    import numpy as np
    import torch

    from tpme.bench.measure.phases import PhaseLog
    from tpme.bench.task.batches import build_batch

    module, workload = script("profile_methods"), script("workload")
    size = replace(module.SIZES[name], encoders="built-in", users=20, items=40, batch=5)
    weights = {}
    for parts in (False, True):
        trainer = workload.make_trainer(size, tmp_path, PhaseLog("cpu", None, None))
        trainer.model.train()
        optimizer, users, of = trainer.optimizer(), np.arange(5), trainer.loader
        torch.manual_seed(0)
        if parts:
            module.staged_step(trainer, users, optimizer)
        else:
            trainer.step(build_batch(of.slots[users], of.log_p, of.store, "suite"), optimizer)
        weights[parts] = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    for key, value in weights[False].items():
        assert torch.allclose(weights[True][key], value, atol=1e-6), key


def test_every_benchmark_has_its_row_in_the_documentation(script: Any) -> None:
    """Rows are made of what pytest-benchmark kept; of every benchmark one at least is documented, and no other."""
    row = {"work": "loss", "target": "5x", "measured": "8.58x", "stand_in": 0.41}
    one = {"fullname": "tests/benchmarks/test_loss.py::test_x[64]", "extra_info": {"rows": [row]}}
    run = {"machine_info": {"cpu": {"brand_raw": "CPU", "count": 2}}, "datetime": "2026-01-02T", "benchmarks": [one]}
    made = script("benchmark_table").table([run])
    assert made.splitlines()[-1] == "| loss | 5x | 8.58x | 0.41 | `test_loss.py::test_x[64]` |"

    (part,) = re.findall(r"<!-- benchmarks -->\n(.*?)<!-- /benchmarks -->", PERFORMANCE.read_text(), flags=re.DOTALL)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(ROOT / "tests" / "benchmarks")]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = set(re.findall(r"^tests/benchmarks/(test_\S+::\S+)$", collected, flags=re.MULTILINE))
    documented = set(re.findall(r"`(test_\w+\.py::\S+)` \|$", part, flags=re.MULTILINE))
    assert documented == wanted


def test_the_table_of_methods_is_that_of_the_docstrings(script: Any) -> None:
    document = (ROOT / "docs" / "methods.md").read_text()
    shown = document.split("<!-- methods -->\n")[1].split("\n<!-- /methods -->")[0]
    assert shown == script("method_table").table()


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def size(script: Any) -> ModuleType:
    module: ModuleType = script("size")
    return module


def parts(size: ModuleType, name: str, *values: tuple[int, float, float]) -> list[Any]:
    return [
        size.Part(users=users, items=users // 10, name=name, seconds=seconds, peak_bytes=peak)
        for users, seconds, peak in values
    ]


def test_what_grows_faster_than_the_data_is_named(size: ModuleType) -> None:
    linear = parts(size, "prepare", (1000, 10.0, 2e9), (10_000, 100.0, 2e10))
    steep = parts(size, "open", (1000, 10.0, 2e9), (10_000, 1000.0, 2e10))
    hungry = parts(size, "run", (1000, 10.0, 2e9), (10_000, 100.0, 2e11))
    small = parts(size, "short", (1000, 0.01, 1e6), (10_000, 1.0, 1e8))
    assert size.too_steep([*linear, *small]) == []
    assert size.too_steep([*linear, *steep]) == ["open: seconds grow with exponent 2.00 up to 10,000 users"]
    assert size.too_steep(hungry) == ["run: memory grows with exponent 2.00 up to 10,000 users"]
    assert size.table([*linear, *small]).splitlines() == [
        "| part | 1,000 users, 100 items | 10,000 users, 1,000 items |",
        "|---|---|---|",
        "| prepare | 10 s, 2.00 GB | 100 s, 20.00 GB (growth 1.00) |",
        "| short | 0.01 s, 0.00 GB | 1 s, 0.10 GB (growth 2.00) |",
    ]


def test_sizes_that_were_measured_are_not_measured_again(
    size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, document, asked = tmp_path / "parts.jsonl", tmp_path / "size.md", []
    document.write_text("before\n<!-- size -->\nold\n<!-- /size -->\nafter\n")

    def measure(users: int, folder: Path, steps: int, evaluated: int) -> Any:
        assert folder.is_dir()
        asked.append((users, steps, evaluated))
        return iter(parts(size, "prepare", (users, users / 10, 2e6 * users)))

    monkeypatch.setattr(size, "parts_of", measure)
    given = ["--steps", "7", "--evaluated", "9", "--out", str(out), "--docs", str(document)]
    assert size.main(["--users", "1000", *given]) == 0
    assert size.main(["--users", "10000", "1000", *given]) == 0
    assert asked == [(1000, 7, 9), (10_000, 7, 9)]
    assert "old" not in document.read_text()
    assert "| prepare | 100 s, 2.00 GB | 1e+03 s, 20.00 GB (growth 1.00) |" in document.read_text()
    out.write_text(out.read_text() + '{"users": 1000')  # killed while writing
    assert len(size.read(out)) == 2


def test_a_part_that_fails_is_reported_with_its_last_words(size: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        size.measured([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


@pytest.mark.slow
def test_every_part_of_a_small_size_is_measured(size: ModuleType, tmp_path: Path) -> None:
    found = {part.name: part for part in size.parts_of(400, tmp_path, 3, 100)}
    first = ["prepare", "open", "open again", "whole run"]
    assert list(found)[:4] == first
    for row in size.ROWS:
        for name in ("load", "train", "validate", "test"):
            assert found[f"{row}: {name}"].seconds > 0
    assert "frozen (cached): build the cache" in found
    assert all(part.peak_bytes is not None for part in found.values())
    assert min(found[name].peak_bytes for name in first) > 10 * 2**20
