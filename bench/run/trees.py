"""Two revisions of a repository side by side, each in its own environment.

A repository that is a Python package is installed from its checkout into a virtual environment of that side, with the
dependencies that the revision itself asks for. What this Python has already, and the revision accepts, is not installed
again but shared. A repository that only holds method files needs no installation: both sides run in this Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tpme.bench.claims import scratch_folder
from tpme.bench.errors import UserError
from tpme.bench.git import run_git
from tpme.bench.lifetimes import marked
from tpme.bench.parsing import read_toml

WORK_TREE = "work tree"


@dataclass(frozen=True)
class Tree:
    """One side: its name, its files and its interpreter."""

    name: str
    root: Path
    python: str = sys.executable
    """The interpreter of its environment."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables it runs with."""

    @property
    def command(self) -> list[str]:
        """A Python whose imports are this side's; ``-P``: and not the working directory's."""
        return ["env", *(f"{name}={value}" for name, value in self.variables.items()), self.python, "-P"]


@contextmanager
def trees(repository: Path, base: str, head: str | None) -> Iterator[tuple[Tree, Tree]]:
    """Check out and install both sides in a temporary folder, removed at the end, or by the next one if it is killed.

    Args:
        repository: a folder of it. base, head: revisions; ``None`` is the work tree as it is now, with its untracked
            files, without its ignored ones.

    Raises:
        UserError: no repository, no such revision, or a package that cannot be installed with what it needs.
    """
    top = Path(_git(repository, "rev-parse", "--show-toplevel", wrong=f"{repository}: not in a git repository"))
    with scratch_folder("ab") as (folder, lock):
        _forget_removed(top)
        try:
            with marked(lock):
                yield (
                    _tree(top, base, folder / "base"),
                    _tree(top, head, folder / "head"),
                )
        finally:
            for checkout in (folder / "base", folder / "head"):
                if (checkout / ".git").is_file():
                    _git(top, "worktree", "remove", "--force", str(checkout), wrong=f"{checkout}: cannot be removed")


def _forget_removed(top: Path) -> None:
    """Let git forget the work trees in temporary folders that are gone."""
    for line in _git(top, "worktree", "list", "--porcelain", wrong=f"{top}: cannot be listed").splitlines():
        path = Path(line.removeprefix("worktree "))
        if line.startswith("worktree ") and path.parent.name.startswith("tpme-ab-") and not path.exists():
            _git(top, "worktree", "remove", "--force", str(path), wrong=f"{path}: cannot be removed")


def _tree(top: Path, revision: str | None, folder: Path) -> Tree:
    if revision is None:
        _copy_work_tree(top, folder)
        name = WORK_TREE
    else:
        wrong = f"{revision}: no such revision in {top}; in a shallow clone, run 'git fetch --unshallow' first"
        commit = _git(top, "rev-parse", "-q", "--verify", "--end-of-options", f"{revision}^{{commit}}", wrong=wrong)
        _git(top, "worktree", "add", "--detach", str(folder), commit, wrong=f"{revision}: cannot be checked out")
        name = f"{revision} ({commit[:10]})" if revision != commit[: len(revision)] else commit[:10]
    python, site = sys.executable, None
    if _is_package(folder, name):
        python, site = _environment(folder.with_name(f"{folder.name}-environment"))
        _install(folder, python, name)
    return Tree(name, folder, python, _variables(top, folder, site))


def _copy_work_tree(top: Path, folder: Path) -> None:
    """A snapshot: edits during the runs do not reach them."""
    listed = _git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard", wrong=f"{top}: cannot be listed")
    for name in filter(None, listed.split("\0")):
        source, target = top / name, folder / name
        if source.is_symlink() or source.is_file():  # a deleted file is still listed; a submodule is a folder
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    folder.mkdir(exist_ok=True)


def _environment(folder: Path) -> tuple[str, Path]:
    """Make a virtual environment that also sees the packages of this one; returns its interpreter and its packages.

    ``venv``'s own ``system_site_packages`` would show the packages of the Python that *this* environment was made from.
    """
    venv.create(folder, symlinks=os.name != "nt")
    where = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", where))
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in shared]
    (site / "shared.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(Path(sysconfig.get_path("scripts", "venv", where)) / "python"), site


def _install(checkout: Path, python: str, name: str) -> None:
    message = "no output"
    # What build and package need is usually here; only where it is not, pip may fetch it.
    for options in (["--no-build-isolation", "--no-index"], []):
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, str(checkout)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        message = (done.stderr.strip() or done.stdout.strip() or message).splitlines()[-1]
    raise UserError(f"{name}: cannot be installed: {message}")


def _variables(top: Path, checkout: Path, site: Path | None) -> dict[str, str]:
    """``PYTHONPATH`` with the side's own packages first; a folder of the repository in it is the checkout's."""
    paths = [] if site is None else [site]
    for path in map(Path.resolve, map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))):
        copy = checkout / path.relative_to(top) if path.is_relative_to(top) else path
        paths.append(copy if copy.exists() else path)
    return {"PYTHONPATH": os.pathsep.join(map(str, paths))} if paths else {}


def _is_package(checkout: Path, name: str) -> bool:
    if (checkout / "setup.py").is_file():
        return True
    try:
        settings = read_toml(checkout / "pyproject.toml")
    except FileNotFoundError:
        return False
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return "project" in settings or "build-system" in settings


def _git(folder: Path, *arguments: str, wrong: str) -> str:
    try:
        done = run_git(folder, *arguments)
    except FileNotFoundError:
        raise UserError("git: not installed; 'tpme ab' needs it") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise UserError(f"{wrong}{f' ({lines[-1]})' if lines else ''}")
    return done.stdout.strip()
