"""``tpme ab``: two revisions side by side, each with its own code, and what comes of it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.bench.run.trees import WORK_TREE, Tree, trees

METHOD = """
import time

from torch import nn

from tpme.bench.task.recommender import TokenFusion
from tpme.methods.base import Method

WIDTH, PAUSE_S = 4, 0.0


class Fusion(TokenFusion):
    def __init__(self, shapes, dim):
        super().__init__(shapes, dim)
        self.down, self.up = nn.Linear(dim, WIDTH), nn.Linear(WIDTH, dim)

    def forward(self, states, ids):
        vectors = super().forward(states, ids)
        return vectors + self.up(self.down(vectors).relu())


class Mine(Method):
    def item_encoder(self, task):
        return Fusion(task.encoders, task.dim)

    def before_step(self, state):
        time.sleep(PAUSE_S)


METHOD = Mine
"""
"""A user's method: a bottleneck on the item vector, and a pause in every step."""


class Repository:
    """A git repository of a user, made step by step."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.git("init", "-q", "-b", "main")
        self.git("config", "user.email", "somebody@example.org")
        self.git("config", "user.name", "Somebody")

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(self.root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def commit(self, files: dict[str, str], tag: str) -> str:
        for name, text in files.items():
            self.write(name, text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", tag)
        self.git("tag", tag)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


# --- checkouts ---------------------------------------------------------------------------------------------------


def test_two_revisions_lie_side_by_side_and_leave_nothing(repository: Repository) -> None:
    repository.commit({"methods/a.py": "first"}, "one")
    repository.commit({"methods/a.py": "second"}, "two")
    with trees(repository.root / "methods", "one", "HEAD") as (base, head):
        assert [(tree.root / "methods" / "a.py").read_text() for tree in (base, head)] == ["first", "second"]
        assert base.command == head.command == ["env", sys.executable, "-P"], "nothing to install: one environment"
        assert base.name.startswith("one (")
        roots = base.root, head.root
    assert not any(root.exists() for root in roots)
    assert len(repository.git("worktree", "list").splitlines()) == 1
    with pytest.raises(ZeroDivisionError), trees(repository.root, "one", "one") as (base, _):
        raise ZeroDivisionError
    assert not base.root.exists()
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_the_work_tree_is_a_snapshot_without_ignored_files(repository: Repository) -> None:
    repository.commit({"a.py": "committed", "gone.py": "", ".gitignore": "data/\n"}, "one")
    repository.write("a.py", "edited")
    repository.write("new.py", "untracked")
    repository.write("data/huge", "ignored")
    (repository.root / "link.py").symlink_to("a.py")
    (repository.root / "folder").symlink_to("data")
    (repository.root / "gone.py").unlink()
    with trees(repository.root, "one", None) as (base, head):
        repository.write("a.py", "edited while it runs")
        assert (base.root / "a.py").read_text() == "committed"
        assert head.name == WORK_TREE
        found = {path.name: path.read_text() for path in head.root.rglob("*") if path.is_file()}
        assert str((head.root / "folder").readlink()) == "data", "links stay links, as git checks them out"
    assert found == {"a.py": "edited", "link.py": "edited", "new.py": "untracked", ".gitignore": "data/\n"}


def test_each_side_of_a_package_imports_its_own_code(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    settings += '[project]\nname = "mine"\nversion = "1"\n[project.entry-points."tpme.methods"]\nmine = "mine:M"\n'
    repository.commit({"pyproject.toml": settings, "mine.py": "SIDE = 'base'\n"}, "one")
    repository.commit({"mine.py": "SIDE = 'head'\n"}, "two")
    code = "import mine, importlib.metadata as m; print(mine.SIDE, *m.entry_points(group='tpme.methods').names)"

    monkeypatch.setenv("PYTHONPATH", str(repository.root))  # as one works on it; it must not come first
    with trees(repository.root, "one", "two") as sides:
        assert [told(tree, code) for tree in sides] == ["base mine", "head mine"]


def told(tree: Tree, code: str) -> str:
    """What a Python of this side prints."""
    return subprocess.run([*tree.command, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_each_side_has_the_dependencies_it_asks_for(repository: Repository, tmp_path: Path) -> None:
    """What the revisions need differs; what they share, torch for one, is that of this environment."""
    settings = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n[project]\n'
    for version in ("1", "2"):
        helper = tmp_path / f"helper-{version}"
        helper.mkdir()
        (helper / "pyproject.toml").write_text(f'{settings}name = "tpme-test-helper"\nversion = "{version}"\n')
        (helper / "tpme_test_helper.py").write_text(f"VERSION = {version}\n")
        needs = f'name = "mine"\nversion = "1"\ndependencies = ["numpy", "tpme-test-helper @ {helper.as_uri()}"]\n'
        repository.commit({"pyproject.toml": settings + needs, "mine.py": ""}, f"v{version}")
    code = "import sys, tpme_test_helper, mine, numpy; print(tpme_test_helper.VERSION, numpy.__file__)"
    with trees(repository.root, "v1", "v2") as sides:
        assert [told(tree, code) for tree in sides] == [f"1 {np.__file__}", f"2 {np.__file__}"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("tpme_test_helper")


def test_a_path_into_the_repository_leads_into_each_checkout(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.commit({"lib/shared_by_methods.py": "SIDE = 'base'\n"}, "one")
    repository.write("lib/shared_by_methods.py", "SIDE = 'head'\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository.root / "lib"), str(tmp_path / "elsewhere")]))
    code = "import sys, shared_by_methods; print(shared_by_methods.SIDE, sys.path[1].rpartition('/')[2])"
    with trees(repository.root, "one", None) as sides:
        assert [told(tree, code) for tree in sides] == ["base elsewhere", "head elsewhere"]


@pytest.mark.parametrize(
    ("base", "files", "words"),
    [
        ("nowhere", {}, "nowhere: no such revision in "),
        ("one", {"pyproject.toml": "[project\n"}, "pyproject.toml: not a readable TOML"),
        ("one", {"setup.py": "raise SystemExit('broken on purpose')\n"}, "cannot be installed"),
    ],
)
def test_what_cannot_be_checked_out_is_one_line(
    repository: Repository, base: str, files: dict[str, str], words: str
) -> None:
    repository.commit({"a.py": ""} | files, "one")
    with pytest.raises(UserError, match=words) as caught, trees(repository.root, base, None):
        pass
    assert "\n" not in str(caught.value)
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_a_folder_that_is_no_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not in a git repository"), trees(tmp_path, "one", None):
        pass


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def ab(harness: ModuleType, world: Any, repository: Repository, tmp_path: Path) -> Any:
    """``ab("one", "two", methods, ...)``: the command on a matrix of these methods; returns process and report."""

    def run(base: str, head: str, methods: list[str], *arguments: str) -> tuple[Any, Any]:
        training = {"users_per_batch": 4, "max_steps_per_epoch": 12}
        matrix = world.write(tmp_path / "matrix.toml", world.matrix(methods, training=training))
        report = tmp_path / "report.json"
        folders = ["--repository", str(repository.root), "--methods-path", str(repository.root / "mine")]
        files = ["--out", str(tmp_path / "ab"), "--json", str(report)]
        done = harness.tpme("ab", base, head, "--matrix", str(matrix), *folders, *files, *arguments, cwd=tmp_path)
        return done, json.loads(report.read_text()) if report.exists() else None

    return run


@pytest.mark.alone
@pytest.mark.slow
def test_a_slower_and_larger_method_is_found_and_measured_twice(
    ab: Any, repository: Repository, tmp_path: Path
) -> None:
    repository.commit({"mine/mine.py": METHOD}, "one")
    changed = METHOD.replace("WIDTH, PAUSE_S = 4, 0.0", "WIDTH, PAUSE_S = 8, 0.2")
    repository.commit({"mine/mine.py": changed}, "two")
    done, report = ab("one", "two", ["mine"], "--rounds", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "base and head in turn: 2 runs, mine" in done.stdout
    assert "again, what looks changed or is not settled: 2 runs, mine" in done.stdout
    (cell,) = report["cells"]
    found = {one["metric"]: one for one in cell["comparisons"]}
    assert found["trainable_parameters"]["verdict"] == "regressed"
    assert found["step_s"]["verdict"] == "slower"
    assert found["step_s"]["head"] > 0.2
    assert found["step_s"]["low"] <= found["step_s"]["ratio"] <= found["step_s"]["high"]
    assert found["host_rss_bytes"]["base"] > 0
    (note,) = report["notes"]
    times = int(re.fullmatch(r"measured (\d) times before judging: mine", note)[1])  # type: ignore[index]
    assert times >= 2  # more on a machine that is busy
    records = [path.relative_to(tmp_path / "ab" / "1") for path in (tmp_path / "ab").rglob("attempt-1.json")]
    expected = [(side, f"run-{number}") for side in ("base", "head") for number in range(1, times + 1)]
    assert sorted((path.parts[0], path.parts[2]) for path in records) == expected


@pytest.mark.slow
def test_a_cell_of_one_side_alone_is_listed_and_nothing_compared_is_no_pass(ab: Any, repository: Repository) -> None:
    repository.commit({"mine/other.py": METHOD}, "one")
    repository.commit({"mine/mine.py": METHOD}, "two")
    done, report = ab("one", "two", ["mine"])
    assert done.returncode == 2, done.stdout + done.stderr
    (cell,) = report["cells"]
    assert (cell["name"], cell["state"]) == ("mine", "new")
    assert "unknown method 'mine'" in cell["note"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one", "nowhere"], "tpme: nowhere: no such revision"),
        (["one", "one", "--methods", "mine,lorra"], "tpme: one ("),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_3(
    ab: Any, repository: Repository, arguments: list[str], words: str
) -> None:
    repository.commit({"mine/mine.py": METHOD}, "one")
    done, report = ab(*arguments[:2], ["mine"], *arguments[2:])
    assert (done.returncode, report) == (3, None)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(words)
    assert len(arguments) == 2 or line.endswith("--methods lorra: the matrix has no such row, only mine")
