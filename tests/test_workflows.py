"""The action and the workflows: what they use, what they may do, and what their inputs can do to them."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = ROOT / "action.yml"
LOCK = ROOT / ".github" / "lock"
NOT_IN_WORKFLOWS = {"jax", "jaxlib", "ml-dtypes", "numpyro", "opt-einsum"} | {
    *("attrs", "jsonschema", "jsonschema-specifications", "msgpack", "ray", "referencing", "rpds-py"),
    *("aiohappyeyeballs", "aiohttp", "aiosignal", "frozenlist", "lightning", "multidict", "propcache"),
    *("pytorch-lightning", "yarl"),
}
"""Pinned for the extras ``saas``, ``ray`` and ``lightning``, which no workflow installs."""


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def steps(path: Path) -> list[dict[str, Any]]:
    content = load(path)
    jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
    return [step for job in jobs for step in job["steps"]]


def triggers(workflow: dict[Any, Any]) -> set[str]:
    on = workflow[True]  # what YAML 1.1 makes of the word on
    return {on} if isinstance(on, str) else set(on)


def test_every_action_is_pinned_by_its_commit() -> None:
    commits: dict[str, set[str]] = {}
    for path in (*WORKFLOWS, ACTION):
        used = [step["uses"] for step in steps(path) if "uses" in step]
        pins = re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$", path.read_text(), flags=re.MULTILINE)
        assert sorted(used) == sorted([f"{name}@{commit}" for name, commit, _ in pins] + ["./"] * used.count("./"))
        for name, commit, version in pins:
            commits.setdefault(name, set()).add(f"{commit} {version}")
    assert set(commits) == {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}
    assert all(len(pins) == 1 for pins in commits.values()), commits
    shown = re.findall(r"uses: (actions/\S+)", (ROOT / "docs" / "ci.md").read_text())
    assert shown
    for name, _, commit in (one.partition("@") for one in shown):
        assert any(pin.startswith(f"{commit} ") for pin in commits[name]), "the documentation shows the same"


def test_workflows_may_only_read() -> None:
    assert [path.stem for path in WORKFLOWS] == ["audit", "ci", "regression"]
    for path in WORKFLOWS:
        workflow = load(path)
        assert workflow["permissions"] == {"contents": "read"}, path
        assert not any("permissions" in job for job in workflow["jobs"].values()), path
        assert triggers(workflow) <= {"push", "pull_request", "schedule", "workflow_dispatch"}, path
        assert not re.search(r"\bsecrets\b|github\.token|GITHUB_TOKEN", path.read_text()), path
        for step in steps(path):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, path
    assert not re.search(r"\bsecrets\b|github\.token|GITHUB_TOKEN", ACTION.read_text())


def test_no_script_is_put_together_from_inputs() -> None:
    scripts = [(path, step["run"]) for path in (*WORKFLOWS, ACTION) for step in steps(path) if "run" in step]
    assert len(scripts) > 8
    for path, script in scripts:
        assert "${{" not in script, f"{path}: {script}"


HOSTILE = {
    "matrix": '--out=/; touch planted "$(touch planted)" `touch planted`',
    "methods-path": "my methods; touch planted",
    "baseline": "$(touch planted).json",
    "base": "--help",
    "require": "time;touch planted",
    "out": "-out && touch planted",
}


@pytest.mark.parametrize("name", ["Check against the baseline", "Compare with the base"])
def test_hostile_inputs_stay_arguments(name: str, tmp_path: Path) -> None:
    """Run by bash as the runner does, with a ``tpme`` that only notes its arguments."""
    (tmp_path / "bin").mkdir()
    tpme = tmp_path / "bin" / "tpme"
    tpme.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> "$NOTES"; printf "\\0" >> "$NOTES"\n')
    tpme.chmod(0o755)
    (tmp_path / "a file that a star would find").touch()
    (step,) = [step for step in steps(ACTION) if step["name"] == name]
    inputs = {key: given.get("default", "") for key, given in load(ACTION)["inputs"].items()} | HOSTILE
    inputs |= {"check-arguments": "--strict\n  * $(touch planted)", "ab-arguments": "--rounds 4 *;touch"}
    variables = {key: inputs[re.findall(r"inputs\.([a-z-]+)", text)[0]] for key, text in step["env"].items()}
    notes = tmp_path / "notes"
    environment = os.environ | variables | {"PATH": f"{tpme.parent}:{os.environ['PATH']}", "NOTES": str(notes)}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("planted*"))
    calls = [call.split("\0") for call in notes.read_text().split("\0\0")[:-1]]
    last = calls[-1]
    assert HOSTILE["require"] in last
    if name == "Compare with the base":
        assert last[-5:] == ["--rounds", "4", "*;touch", "--", "--help"]
        assert HOSTILE["matrix"] in last
        assert HOSTILE["methods-path"] in last
    else:
        assert [call[-2:] for call in calls[:-1]] == [["--", HOSTILE["matrix"]]] * 3
        assert last[last.index("--baseline") + 1] == HOSTILE["baseline"]
        assert last[last.index("--strict") :][:4] == ["--strict", "*", "$(touch", "planted)"]


def test_the_summary_takes_any_folder(tmp_path: Path) -> None:
    (step,) = [step for step in steps(ACTION) if step["name"] == "Summary"]
    folder = tmp_path / HOSTILE["out"]
    folder.mkdir()
    (folder / "check.md").write_text("found\n")
    environment = os.environ | {"OUT": HOSTILE["out"], "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "summary").read_text() == "found\n"


def test_a_number_of_runs_is_a_number(tmp_path: Path) -> None:
    (step,) = [step for step in steps(ACTION) if step["name"] == "Check against the baseline"]
    for runs in ("", "0", "3; touch planted", "100000000", "-1"):
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        variables = dict.fromkeys(step["env"], "") | {"RUNS": runs, "OUT": "out"}
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (3, "runs: a number from 1 to 99\n")
    assert list(tmp_path.iterdir()) == []


# --- the lock -------------------------------------------------------------------------------------------------------


def pins(path: Path) -> dict[str, str]:
    """Version of each package of a requirements file, by normalised name."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    parts = [line.partition(" --hash=")[0].partition("==") for line in lines]
    return {canonicalize_name(name): version for name, _, version in parts}


@pytest.mark.parametrize("name", ["ci.txt", "audit.txt"])
def test_every_line_of_a_lock_has_a_version_and_a_hash(name: str) -> None:
    header, *lines = (LOCK / name).read_text(encoding="utf-8").splitlines()
    assert header.startswith("# Made by scripts/lock.py")
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+!]+ --hash=sha256:[0-9a-f]{64}", line), line


def test_the_lock_is_that_of_the_constraints() -> None:
    constraints, locked = pins(ROOT / "constraints.txt"), pins(LOCK / "ci.txt")
    assert {name: version for name, version in constraints.items() if locked.get(name) != version}.keys() == (
        NOT_IN_WORKFLOWS
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], "tox"]
    extras = re.findall(r"^extras = test, (.+)$", (ROOT / "tox.ini").read_text(), flags=re.MULTILINE)[0].split(", ")
    for extra in ("test", *extras):
        wanted += project["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_packages_come_with_their_hashes_and_from_nowhere_else(tmp_path: Path) -> None:
    """The script that every job runs first, with a ``python`` that only notes its arguments."""
    for path in (one for one in WORKFLOWS if one.stem != "audit"):
        for job in load(path)["jobs"].values():
            ran = [step["run"] for step in job["steps"] if "run" in step]
            assert ran[0] == ".github/lock/fetch", path
    python, variables = tmp_path / "python", tmp_path / "variables"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"RUNNER_TEMP": str(tmp_path), "GITHUB_ENV": str(variables)}
    done = subprocess.run([LOCK / "fetch"], env=environment, capture_output=True, text=True, check=True)
    options = "-q --no-deps --require-hashes --only-binary :all:"
    assert done.stdout == f"-m pip download {options} -r .github/lock/ci.txt -d {tmp_path}/wheels\n"
    assert variables.read_text() == f"PIP_NO_INDEX=1\nPIP_FIND_LINKS={tmp_path}/wheels\n"


def test_dependencies_are_audited_every_week() -> None:
    workflow = load(ROOT / ".github" / "workflows" / "audit.yml")
    (schedule,) = workflow[True]["schedule"]  # type: ignore[index]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    scripts = [step["run"] for step in steps(ROOT / ".github" / "workflows" / "audit.yml") if "run" in step]
    assert "--require-hashes" in scripts[0]
    audits = [f"pip-audit --disable-pip --require-hashes -r .github/lock/{name}.txt" for name in ("ci", "audit")]
    assert scripts[1:] == audits
    assert "pip-audit" in pins(LOCK / "audit.txt")
