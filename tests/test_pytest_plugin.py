"""The plug-in in a session of its own, as a user's tests load it."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from tpme.bench import Recorder

pytest_plugins = ["pytester"]

PLUGIN = (
    [] if any(point.name == "tpme" for point in entry_points(group="pytest11")) else ["-p", "tpme.bench.pytest_plugin"]
)


@pytest.fixture
def session(pytester: pytest.Pytester, world: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``body`` as a test file in a new process, beside a matrix ``small.toml``; returns pytest's result."""
    world.write(
        pytester.path / "small.toml",
        world.matrix(["frozen"], training={"users_per_batch": 16, "max_steps_per_epoch": 4}),
    )
    monkeypatch.setenv("TPME_STORE", str(world.store))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark writes no file in a worker

    def run(body: str, *arguments: str) -> Any:
        pytester.makepyfile("import pytest\n" + body)
        return pytester.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider", *arguments)

    return run


def test_a_cell_its_limits_and_the_benchmark_json(session: Any, pytester: pytest.Pytester) -> None:
    result = session(
        """
@pytest.mark.tpme(max_params=10**9, max_saved_bytes=10**12, max_flops=10**15)
def test_within(tpme_cell):
    cell = tpme_cell("bitfit", matrix="small.toml")
    assert cell.result.status == "ok"
    assert cell.counters["trainable_parameters"] == cell.result.parameters.trainable
    assert len(cell.step_s) == 3  # the first of four steps is warm-up

@pytest.mark.benchmark(group="own")
@pytest.mark.tpme(max_params=10, max_cache_bytes=1)
def test_beyond(tpme_cell):
    tpme_cell("bitfit", matrix="small.toml")
""",
        "--benchmark-json=out.json",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*bitfit has trainable_parameters = *, the limit is max_params=10",
            "*max_cache_bytes=1: cache_bytes of bitfit is not known: *",
        ]
    )
    within, beyond = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert (within["stats"]["rounds"], beyond["group"]) == (3, "own")
    assert 0 < within["stats"]["min"] <= within["stats"]["median"] < 60
    info = within["extra_info"]
    assert info["tpme_cell"] == "bitfit"
    assert info["counters"]["trainable_parameters"] > 10
    assert info["memory"]["host_rss_bytes"] > 0


def test_what_measures_nothing_fails(session: Any) -> None:
    result = session(
        """
@pytest.mark.tpme(max_params=1)
def test_without_the_fixture():
    pass

@pytest.mark.tpme(max_params=1)
def test_without_a_cell(tpme_cell):
    pass

@pytest.mark.tpme(max_parms=1)
def test_misspelt(tpme_cell):
    pass

def test_unknown_method(tpme_cell):
    tpme_cell("lorra", matrix="small.toml")

def test_no_matrix(tpme_cell):
    tpme_cell("lora", matrix="nowhere.toml")
"""
    )
    # The second passes and then fails in its teardown, the third before it starts.
    result.assert_outcomes(passed=1, failed=2, errors=3)
    result.stdout.fnmatch_lines_random(
        [
            "*test_without_the_fixture is marked tpme(...), but ran no cell: nothing was measured*",
            "*test_without_a_cell is marked tpme(...), but ran no cell*",
            "*max_parms is not a limit; choose from max_params, *",
            "*unknown method 'lorra'; did you mean 'lora'?*",
            "*nowhere.toml*",
        ]
    )


@pytest.mark.slow
def test_limits_hold_for_classes_and_under_xdist(session: Any) -> None:
    """Two processes share the store; pytest-benchmark times nothing there, and the limits hold all the same."""
    pytest.importorskip("xdist")
    result = session(
        """
@pytest.mark.tpme(max_params=10)
class TestCosts:
    def test_one(self, tpme_cell):
        tpme_cell("frozen", matrix="small.toml")

    def test_two(self, tpme_cell):
        tpme_cell("iisan", matrix="small.toml", cached=True)

@pytest.mark.tpme(max_params=10**9)
def test_within(tpme_cell):
    assert tpme_cell("iisan", matrix="small.toml", cached=True).result.cell.cached
""",
        "-n2",
    )
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines_random(["*frozen has trainable_parameters*", "*iisan (cached) has trainable_param*"])


def test_loading_the_plugin_costs_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import sys
def test_imports():
    loaded = {"torch", "pydantic", "numpy", "pandas"} & set(sys.modules)
    assert not loaded
"""
    )
    pytester.runpytest_subprocess(*PLUGIN, "-p", "no:benchmark").assert_outcomes(passed=1)


def test_other_sessions_are_left_alone(session: Any, tmp_path: Path) -> None:
    session("def test_plain():\n    pass\n", "--strict-markers").assert_outcomes(passed=1)


@pytest.mark.slow
def test_the_contract_suite_on_a_method_of_ones_own(session: Any, pytester: pytest.Pytester) -> None:
    methods = pytester.mkdir("methods")
    body = "from tpme.methods.id import ItemIDs\nclass Mine(ItemIDs):\n{}\nMETHOD = Mine\n"
    (methods / "good.py").write_text(body.format("    pass"))
    (methods / "bad.py").write_text(body.format("    def trainable_parameters(self, task, views): return 1"))
    result = session(
        """
def test_good(tpme_contract):
    results = tpme_contract("good", methods_path="methods")
    assert {result.status for result in results} == {"passed", "skipped"}
    assert any(result.check == "state_round_trip" for result in results)

def test_bad(tpme_contract):
    tpme_contract("bad", methods_path="methods")

def test_unknown(tpme_contract):
    tpme_contract("goood", methods_path="methods")
"""
    )
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "failed  bad: parameter_formula: trainable_parameters gives 1 at these options, but *",
            "tpme_contract: unknown method 'goood'; did you mean 'good'?",
        ]
    )


# --- recorded trainings ---------------------------------------------------------------------------------------


def record(folder: Path, width: int = 8, seed: int = 1) -> Path:
    """The record of a small training with counted FLOPs."""
    inputs = torch.randn(4, 8)
    with Recorder(task="own", method="linear", folder=folder, device="cpu", version="v", seed=seed) as run:
        model = torch.nn.Linear(8, width)
        run.model(model)
        run.flops(lambda: model(inputs).sum())
        with run.phase("train", epoch=1):
            for _ in range(3):
                model(inputs).sum().backward()
                run.step()
        run.metric("accuracy", 0.5, higher_is_better=True)
    assert run.path is not None
    return run.path


def test_recorded_trainings_are_held_to_limits_and_a_baseline(session: Any, pytester: pytest.Pytester) -> None:
    for place, seed in (("base", 1), ("same", 1), ("two", 1), ("two", 2)):
        record(pytester.path / place, seed=seed)
    wider = record(pytester.path / "wider", width=16)
    with (
        pytest.raises(ValueError, match="broke"),
        Recorder(task="own", method="linear", folder=pytester.path / "failed", device="cpu"),
    ):
        raise ValueError("broke")
    result = session(
        f"""
THRESHOLDS = {{"time_threshold": 10.0, "resident_bound": 10.0}}

@pytest.mark.tpme(max_params=80, max_flops=2000)
def test_within(tpme_recorded, tpme_check):
    cell = tpme_recorded("same")
    assert cell.result.cell.task == "own" and len(cell.step_s) == 2  # without the warm-up
    report = tpme_check("same", baseline="base", require="counter,quality", **THRESHOLDS)
    assert (report.overall, report.compared["quality"]) == ("fine", 1)

@pytest.mark.tpme(max_params=80)
def test_beyond(tpme_recorded):
    tpme_recorded({str(wider)!r})

@pytest.mark.tpme(max_params=80)
def test_nothing_read(tpme_recorded):
    pass

def test_more(tpme_check):
    tpme_check(["wider"], baseline="base", **THRESHOLDS)

def test_several(tpme_recorded):
    tpme_recorded("two")

def test_a_failure(tpme_recorded):
    tpme_recorded("failed")

def test_no_records(tpme_recorded):
    tpme_recorded("nowhere")

def test_no_baseline(tpme_check):
    tpme_check("same", baseline="nothing.json")

def test_an_unknown_threshold(tpme_check):
    tpme_check("same", baseline="base", times=1)
"""
    )
    result.assert_outcomes(passed=2, failed=7, errors=1)
    result.stdout.fnmatch_lines_random(
        [
            "*linear has trainable_parameters = 144, the limit is max_params=80",
            "*test_nothing_read is marked tpme(...), but ran no cell*call the fixture tpme_cell or tpme_recorded",
            "regressed: linear: trainable parameters 72 -> 144 (+100.00%; exact)",
            "tpme check: regressed (*",
            "tpme_recorded: two holds 2 cells; name the record of one",
            "tpme_recorded: linear ended as error: ValueError: broke",
            "tpme_recorded: *nowhere*",
            "tpme_check: *nothing.json: no such baseline; write it with 'tpme baseline'",
            "tpme_check: times: *",
        ]
    )
