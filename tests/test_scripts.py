"""The scripts that measure: what they keep, what they put into documents, and that a step in parts is a step."""

from __future__ import annotations

import importlib
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
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``script(name)``: one of ``scripts/``, which import each other as files of one folder."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


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
    assert set(re.findall(r"`(test_\w+\.py::\S+)` \|$", part, flags=re.MULTILINE)) == wanted


def test_the_table_of_methods_is_that_of_the_docstrings(script: Any) -> None:
    document = (ROOT / "docs" / "methods.md").read_text()
    shown = document.split("<!-- methods -->\n")[1].split("\n<!-- /methods -->")[0]
    assert shown == script("method_table").table()


def test_the_figure_of_a_federation_shows_bytes_by_round_and_what_they_buy(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = script("procedure_figures")
    monkeypatch.setattr(figures, "_federated", lambda _folder, _options: (rounds, 0.25))
    from tpme.methods.base import Validation
    from tpme.methods.parts.federation import Round

    found = [None, Validation(0.1, 0.05), None, Validation(0.3, 0.1)]
    rounds = [Round(20, 10**6, 10**6, 2.0, 1.0, one) for one in found]
    sent, quality = figures.fedpeptao(tmp_path).axes
    assert [line.get_ydata().tolist() for line in sent.lines[:2]] == [[2, 4, 6, 8], [0.5, 1, 1.5, 2]]
    assert [list(axis) for axis in quality.lines[0].get_data()] == [[4, 8], [0.1, 0.3]]
    assert figures.main(["fedpeptao", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "fedpeptao.png").stat().st_size > 10_000
