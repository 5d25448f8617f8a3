"""``tpme check`` and ``tpme baseline`` as CI runs them; the project's own gate; the action's steps by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tpme.bench import cli
from tpme.bench.run.matrix import load_matrix
from tpme.methods.registry import BUILTIN
from tpme.reports.gate.baseline import read_baseline
from tpme.reports.gate.verdict import CellVerdict, Comparison, GateReport

ROOT = Path(__file__).resolve().parents[1]
Tpme = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, harness: ModuleType) -> Path:
    """Counters of two methods at base shape, counted now."""
    folder = tmp_path_factory.mktemp("counted")
    matrix = (ROOT / "baselines" / "base-shape.toml").read_text()
    few = re.sub(r"methods = \[.*?\n\]", 'methods = [{ name = "bitfit" }, { name = "popularity" }]', matrix, flags=re.S)
    (folder / "few.toml").write_text(few)
    done = harness.tpme_here("baseline", "--count", str(folder / "few.toml"), "--out", str(folder / "few.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "few.json"


# --- the project's own gate --------------------------------------------------------------------------------------


def test_every_method_stands_in_the_committed_baseline() -> None:
    listed = {entry.name for entry in load_matrix(str(ROOT / "baselines" / "base-shape.toml")).methods}
    kept = {one.cell.method for one in read_baseline(ROOT / "baselines" / "base-shape.json").cells}
    assert listed == kept == set(BUILTIN)


def test_the_committed_counters_are_those_of_this_code(counted: Path, harness: ModuleType, tmp_path: Path) -> None:
    baseline = ROOT / "baselines" / "base-shape.json"
    done = harness.tpme_here("check", str(counted), "--baseline", str(baseline))
    assert done.returncode == 0, done.stdout
    strict = harness.tpme_here("check", str(counted), "--baseline", str(baseline), "--strict")
    assert strict.returncode == 1  # only two of the methods were counted
    changed = tmp_path / "changed.json"
    trainable = '"trainable_parameters": 411968'  # BitFit, as the reference counts it without the pooler
    assert trainable in counted.read_text()
    changed.write_text(counted.read_text().replace(trainable, '"trainable_parameters": 411969'))
    done = harness.tpme_here("check", str(changed), "--baseline", str(baseline))
    assert done.returncode == 1
    assert "regressed  bitfit  trainable parameters" in done.stdout
    assert "tpme baseline --count" in (ROOT / "baselines" / "base-shape.toml").read_text()


def test_a_baseline_is_not_replaced_by_accident(counted: Path, harness: ModuleType, tmp_path: Path) -> None:
    kept = shutil.copy(counted, tmp_path / "kept.json")
    edited = kept.read_text().replace('"trainable_parameters": 411968', '"trainable_parameters": 500000')
    kept.write_text(edited)
    command = ["baseline", "--count", str(counted.with_suffix(".toml")), "--out", str(kept)]
    done = harness.tpme_here(*command)
    assert (done.returncode, kept.read_text()) == (2, edited)
    assert "--update keeps" in done.stderr
    done = harness.tpme_here(*command, "--update")
    assert done.returncode == 0
    assert "improved  bitfit  trainable parameters" in done.stdout  # an update says what it accepts
    assert '"trainable_parameters": 411968' in kept.read_text()
    kept.write_text(edited.replace('"schema_version": 1', '"schema_version": 0'))
    done = harness.tpme_here(*command, "--update")
    assert (done.returncode, done.stderr.count("schema version 0")) == (2, 1)
    done = harness.tpme_here(*command, "--replace")  # what the message above tells to do
    assert done.returncode == 0, done.stderr
    assert '"trainable_parameters": 411968' in kept.read_text()


def test_the_documentation_names_every_field_of_the_report() -> None:
    text = (ROOT / "docs" / "ci.md").read_text()
    for model in (GateReport, CellVerdict, Comparison):
        missing = [name for name in model.model_fields if not re.search(rf"`(cells\[\]\.)?{name}\b", text)]
        assert not missing, model


# --- exit codes --------------------------------------------------------------------------------------------------


@pytest.fixture
def check(harness: ModuleType, tmp_path: Path) -> Tpme:
    """``tpme check`` with its arguments, in an empty folder."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = harness.tpme_here(
            "check", *map(str, arguments), cwd=tmp_path, env={"GITHUB_ACTIONS": "", **environment}
        )
        return done

    return run


def test_the_exit_codes_and_all_files(check: Tpme, counted: Path, tmp_path: Path) -> None:
    names = {"--json": "r.json", "--markdown": "r.md", "--junit": "r.xml", "--benchmark-json": "b.json"}
    files = [word for pair in names.items() for word in pair]
    done = check(counted, "--baseline", counted, *files, GITHUB_ACTIONS="true")
    assert done.returncode == 0, done.stderr
    assert re.search(r"the check itself took \d+\.\d\d s", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("::notice title=tpme check::tpme check: no regression")
    report = GateReport.model_validate_json((tmp_path / "r.json").read_bytes())
    assert report.compared["counter"] > 8
    assert (tmp_path / "r.md").read_text().startswith("### ✅ tpme check: no regression")
    assert ElementTree.parse(tmp_path / "r.xml").getroot().get("failures") == "0"
    assert json.loads((tmp_path / "b.json").read_text())

    other = tmp_path / "other.json"
    shutil.copy(counted, other)
    raw = json.loads(other.read_text())
    raw["cells"] = raw["cells"][:1]
    other.write_text(json.dumps(raw))
    raw["cells"] = json.loads(counted.read_text())["cells"][1:]
    (tmp_path / "rest.json").write_text(json.dumps(raw))
    done = check("rest.json", "--baseline", "other.json")
    assert done.returncode == 2
    assert "nothing was compared" in done.stdout
    for require in (["--require", "time"], ["--require", "counter", "--require", "quality,time"]):
        done = check(counted, "--baseline", counted, *require)
        assert done.returncode == 2
        assert re.match(r"Compared: counters of \d+ cells\. Not compared: time, memory and quality", done.stdout)
        assert "tpme check: what is required was not settled" in done.stdout
    assert check(counted, "--baseline", counted, "--require", "counter").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        [],
        ["runs"],
        ["nowhere", "--baseline", "nowhere.json"],
        ["nowhere", "--baseline", "FILE"],
        ["FILE", "--baseline", "FILE", "--require", "speed"],
        ["FILE", "--baseline", "FILE", "--time-threshold", "lots"],
        ["FILE", "--baseline", "FILE", "--json", "/dev/null/report.json"],
    ],
)
def test_mistakes_exit_with_3(check: Tpme, counted: Path, arguments: list[str]) -> None:
    done = check(*(str(counted) if word == "FILE" else word for word in arguments))
    assert done.returncode == 3, done.stdout
    assert "Traceback" not in done.stderr


def test_a_bug_is_no_regression(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tpme.reports.gate.check.load_runs", broken)
    baseline = str(ROOT / "baselines" / "base-shape.json")
    with pytest.raises(SystemExit) as ended:
        cli.app(["check", "runs", "--baseline", baseline])
    assert ended.value.code == 3  # Python's own 1 would read as a regression
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_check_starts_without_torch() -> None:
    code = (
        "import sys, tpme.bench.commands.check; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the action, and a new user ----------------------------------------------------------------------------------


def steps(action: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in action["runs"]["steps"]}


def test_workflows_and_action_are_well_formed() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert all(step["shell"] == "bash" for step in steps(action).values())
    used = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert used == set(action["inputs"])
    for name in ("ci", "regression"):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                assert set(step.get("with", {})) <= set(action["inputs"]) or step["uses"] != "./"
    load_matrix(str(ROOT / "baselines" / "pull-request.toml"))


METHOD = '''
"""A bottleneck on the item vector."""

import time

from torch import nn

from tpme.bench.task.recommender import TokenFusion
from tpme.methods.base import Method

BOTTLENECK = 4


class Fusion(TokenFusion):
    def __init__(self, shapes, dim):
        super().__init__(shapes, dim)
        self.down, self.up = nn.Linear(dim, BOTTLENECK), nn.Linear(BOTTLENECK, dim)

    def forward(self, states, ids):
        vectors = super().forward(states, ids)
        return vectors + self.up(self.down(vectors).relu())


class Tower(Method):
    def item_encoder(self, task):
        return Fusion(task.encoders, task.dim)

    def before_step(self, state):
        pass


METHOD = Tower
'''


@pytest.fixture
def gate_step(world: Any, tmp_path: Path) -> Callable[[], tuple[int, str]]:
    """The action's check step, run in the user's repository as the runner would: exit code and summary."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = steps(action)["Check against the baseline"]
    inputs = {name: given.get("default", "") for name, given in action["inputs"].items()}
    # Tests share their cores with others: only what no burst can explain is a change of time here.
    inputs |= {
        "matrix": "matrix.toml",
        "methods-path": "my-methods",
        "baseline": "baseline.json",
        "runs": "2",
        "check-arguments": "--time-threshold 9 --resident-bound 1",
    }
    given = {name: inputs[re.findall(r"inputs\.([a-z-]+)", text)[0]] for name, text in step["env"].items()}
    (tmp_path / "bin").mkdir()
    tpme = tmp_path / "bin" / "tpme"
    tpme.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tpme.bench.cli "$@"\n')
    tpme.chmod(0o755)
    summary = tmp_path / "summary"
    environment = os.environ | given | {"TPME_STORE": str(world.store), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(summary)}

    def bash(script: str) -> tuple[int, str]:
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path / "user", env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def run(script: str = step["run"]) -> tuple[int, str]:
        summary.write_text("")
        code, told = bash(script)
        assert bash(steps(action)["Summary"]["run"])[0] == 0
        return code, told + summary.read_text()

    return run


@pytest.mark.alone
@pytest.mark.slow
def test_as_a_new_user(gate_step: Callable[..., tuple[int, str]], world: Any, tmp_path: Path) -> None:
    user = tmp_path / "user"
    (user / "my-methods").mkdir(parents=True)
    method = user / "my-methods" / "tower.py"
    method.write_text(METHOD)
    training = {"users_per_batch": 4, "max_steps_per_epoch": 12}
    world.write(user / "matrix.toml", world.matrix(["frozen"], training=training))
    text = (user / "matrix.toml").read_text()
    (user / "matrix.toml").write_text(text.replace('"frozen"', '"tower"'))

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=user, check=True, capture_output=True)

    def commit(message: str, text: str) -> None:
        method.write_text(text)
        git("commit", "-q", "-a", "-m", message)

    git("init", "-q", "-b", "main")
    (user / ".gitignore").write_text("tpme-gate/\nruns/\n")
    git("add", "-A")
    git("commit", "-q", "-m", "a method of my own")
    first = "tpme run matrix.toml --methods-path my-methods --out runs/first --no-report && "
    code, told = gate_step(first + "tpme baseline runs/first --out baseline.json")
    assert code == 0, told
    git("add", "baseline.json")
    git("commit", "-q", "-m", "baseline")

    commit("change nothing", METHOD + "\n# a comment\n")
    code, told = gate_step()
    assert code == 0, told
    assert "no regression" in told

    commit("double the bottleneck", METHOD.replace("BOTTLENECK = 4", "BOTTLENECK = 8"))
    code, told = gate_step()
    assert code == 1, told
    assert "🔴 regressed | tower | trainable parameters" in told

    commit("sleep in the step", METHOD.replace("        pass", "        time.sleep(1.0)"))
    code, told = gate_step()
    assert code == 1, told
    assert "🔴 slower | tower | training step" in told
    assert "trainable parameters" not in told
