"""What git does not run for us: hooks, filters, monitors; what it does not follow: submodules and Git LFS."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tpme.bench.errors import UserError
from tpme.bench.git import run_git
from tpme.bench.measure.environment import git_state
from tpme.bench.run.trees import trees

HOOKS = ("post-checkout", "reference-transaction", "post-index-change", "fsmonitor-watchman", "pre-auto-gc")


def plain_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A folder in which everything that git runs leaves a file."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def program(path: Path, marks: Path, name: str, then: str = "cat") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ntouch {marks}/{name}\n{then}\n")
    path.chmod(0o755)


@pytest.fixture
def trap(tmp_path: Path, marks: Path) -> Path:
    """A repository that runs its own files wherever git lets it, with a submodule and a file of Git LFS."""
    library, root = tmp_path / "library", tmp_path / "trap"
    for folder in (library, root):
        folder.mkdir()
        plain_git(folder, "init", "-q", "-b", "main")
    (library / "of-the-submodule.py").write_text("")
    for folder in (library, root):
        plain_git(folder, "add", "-A")
        plain_git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    plain_git(root, "submodule", "add", "-q", str(library), "vendored")
    for name in HOOKS:
        program(root / "hooks" / name, marks, f"relative-{name}", "true")
        program(root / ".git" / "hooks" / name, marks, name, "true")
    program(root / "a" / "filter", marks, "filter")
    (root / ".gitattributes").write_text("*.py filter=mine\n*.bin filter=lfs\n")
    (root / "method.py").write_text("as it is stored\n")
    (root / "weights.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    plain_git(root, "add", "-A")
    plain_git(root, "commit", "-q", "-m", "two")
    relative = {"clean": "a/filter", "smudge": "a/filter", "required": "true"}
    settings = {f"filter.mine.{name}": value for name, value in relative.items()}
    settings |= {"filter.lfs.process": f"touch {marks}/lfs", "filter.lfs.required": "true"}
    settings |= {"filter.a=b.smudge": "a/filter", "hook.mine.event": "post-checkout", "hook.mine.command": "a/filter"}
    settings |= {"core.hooksPath": "hooks", "core.fsmonitor": "a/filter", "submodule.recurse": "true"}
    for name, value in settings.items():
        plain_git(root, "config", name, value)
    for path in marks.iterdir():
        path.unlink()
    return root


def test_the_trap_works(trap: Path, marks: Path, tmp_path: Path) -> None:
    """Otherwise the tests below would show nothing."""
    with pytest.raises(subprocess.CalledProcessError):  # its Git LFS speaks no protocol, its submodule is not there
        plain_git(trap, "worktree", "add", "--detach", str(tmp_path / "there"), "HEAD")
    for name in ("filter.lfs.required", "filter.lfs.process", "submodule.recurse"):
        plain_git(trap, "config", "--unset", name)
    plain_git(trap, "worktree", "add", "--detach", str(tmp_path / "again"), "HEAD")
    left = {path.name for path in marks.iterdir()}
    assert {"filter", "lfs", "relative-post-checkout"} <= left


def test_a_comparison_runs_nothing_of_the_checkout_before_its_cells(trap: Path, marks: Path) -> None:
    with trees(trap, "HEAD", None) as (base, head):
        for side in (base, head):
            assert (side.root / "method.py").read_text() == "as it is stored\n"
            assert (side.root / "weights.bin").read_text().startswith("version https://git-lfs")
            assert not list(side.root.rglob("of-the-submodule.py"))
            assert git_state(side.root / "method.py")[0] in (None, plain_git(trap, "rev-parse", "HEAD"))
    assert [path.name for path in marks.iterdir()] == []
    assert len(plain_git(trap, "worktree", "list").splitlines()) == 1


def test_the_state_of_the_sources_runs_nothing(trap: Path, marks: Path) -> None:
    (trap / "method.py").write_text("changed, so that git compares it through its filter\n")
    assert git_state(trap / "method.py")[1] is False, "not one of the suite's folders"
    assert "method.py" in run_git(trap, "status", "--porcelain").stdout
    assert [path.name for path in marks.iterdir()] == []


def test_the_users_own_settings_stay_and_those_of_a_calling_git_do_not(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.name")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "set in the environment")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "library" / ".git"))  # as in a hook, or in "git rebase --exec"
    monkeypatch.setenv("GIT_CONFIG_PARAMETERS", "'core.hooksPath=hooks' 'core.fsmonitor=a/filter'")  # git -c ...
    assert run_git(trap, "config", "user.name").stdout == "set in the environment\n"
    assert run_git(trap, "config", "core.hooksPath").stdout == f"{os.devnull}\n"
    assert run_git(trap, "rev-parse", "--show-toplevel").stdout == f"{trap}\n"


def test_a_revision_is_never_an_option(trap: Path) -> None:
    with pytest.raises(UserError, match=r"^--help: no such revision in "), trees(trap, "--help", None):
        pass
