"""Two revisions of a repository side by side, each installed apart from the other.

A repository that is a Python package is installed from its checkout into a folder of its own, without dependencies and
without the network; the folder comes first on that side's ``PYTHONPATH``, and everything else is shared. A repository
that only holds method files needs no installation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tpme.bench.errors import UserError

WORK_TREE = "work tree"


@dataclass(frozen=True)
class Tree:
    """One side: what it is called, where its files are, and where its package is installed, if it is one."""

    name: str
    root: Path
    installed: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a Python process uses this side's code."""
        if self.installed is None:
            return {}
        paths = [str(self.installed), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def trees(repository: Path, base: str, head: str | None) -> Iterator[tuple[Tree, Tree]]:
    """Check out and install both sides in a temporary folder, removed at the end.

    Args:
        repository: a folder of it. base, head: revisions; ``None`` is the work tree as it is now, with its untracked
            files, without its ignored ones.

    Raises:
        UserError: no repository, no such revision, or a package that cannot be installed.
    """
    top = Path(_git(repository, "rev-parse", "--show-toplevel", wrong=f"{repository}: not in a git repository"))
    folder = Path(tempfile.mkdtemp(prefix="tpme-ab-"))
    try:
        yield (
            _tree(top, base, folder / "base"),
            _tree(top, head, folder / "head"),
        )
    finally:
        for checkout in (folder / "base", folder / "head"):
            if (checkout / ".git").is_file():
                _git(top, "worktree", "remove", "--force", str(checkout), wrong=f"{checkout}: cannot be removed")
        shutil.rmtree(folder, ignore_errors=True)


def _tree(top: Path, revision: str | None, folder: Path) -> Tree:
    if revision is None:
        _copy_work_tree(top, folder)
        name = WORK_TREE
    else:
        wrong = f"{revision}: no such revision in {top}; a shallow clone has few (git fetch --unshallow)"
        commit = _git(top, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", wrong=wrong)
        _git(top, "worktree", "add", "--detach", str(folder), commit, wrong=f"{revision}: cannot be checked out")
        name = f"{revision} ({commit[:10]})" if revision != commit[: len(revision)] else commit[:10]
    return Tree(name, folder, _install(folder, folder.with_name(f"{folder.name}-installed"), name))


def _copy_work_tree(top: Path, folder: Path) -> None:
    """A snapshot, so that edits made while the runs go on reach none of them."""
    listed = _git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard", wrong=f"{top}: cannot be listed")
    for name in filter(None, listed.split("\0")):
        source, target = top / name, folder / name
        if source.is_file():  # a deleted file is still listed; a submodule is a folder
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    folder.mkdir(exist_ok=True)


def _install(checkout: Path, target: Path, name: str) -> Path | None:
    if not _is_package(checkout, name):
        return None
    # What the build needs is usually installed; only where it is not, pip may fetch it.
    told = "no output"
    for options in (["--no-build-isolation", "--no-index"], []):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = _run([*command, *options, "--target", str(target), str(checkout)])
        if done.returncode == 0:
            return target
        told = (done.stderr.strip() or done.stdout.strip() or told).splitlines()[-1]
        shutil.rmtree(target, ignore_errors=True)
    raise UserError(f"{name}: cannot be installed: {told}")


def _is_package(checkout: Path, name: str) -> bool:
    if (checkout / "setup.py").is_file():
        return True
    try:
        settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{name}: pyproject.toml is not readable: {error}") from None
    return "project" in settings or "build-system" in settings


def _git(folder: Path, *arguments: str, wrong: str) -> str:
    done = _run(["git", "-C", str(folder), *arguments])
    if done.returncode != 0:
        told = done.stderr.strip().splitlines()
        raise UserError(f"{wrong}{f' ({told[-1]})' if told else ''}")
    return done.stdout.strip()


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not installed; 'tpme ab' needs it") from None
