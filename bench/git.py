"""Runs git without running anything else: no hook, no filter, no file-system monitor, no submodule.

A repository says through its settings and its files what git calls beside itself, and a relative path there may lead
into the very revision that is checked out. The user's own settings otherwise stay: ``safe.directory`` is one of them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_OFF = {"core.hooksPath": os.devnull, "core.fsmonitor": "false", "submodule.recurse": "false"}
_OF_ANOTHER = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX",
    "GIT_NAMESPACE", "GIT_EXTERNAL_DIFF",
)  # fmt: skip
"""Variables that git sets where it runs a program: they name the repository of that call."""


def run_git(folder: Path, *arguments: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run git in ``folder``; the caller looks at the return code.

    A checkout writes files as they are stored, past every filter: of Git LFS, the pointers. Asks for nothing on the
    terminal.

    Raises:
        OSError: git is not installed. subprocess.TimeoutExpired: it took longer than ``timeout_s``.
    """
    listed = _run(folder, ("config", "--null", "--name-only", "--get-regexp", r"^(filter|hook)\."), _OFF, timeout_s)
    return _run(folder, arguments, _OFF | _switched_off(listed.stdout), timeout_s)


def _switched_off(listed: str) -> dict[str, str]:
    """Settings that switch off each filter and each hook (git 2.54) in the output of ``git config``."""
    settings = {}
    for section in {name.rpartition(".")[0] for name in listed.split("\0") if name}:
        if section.startswith("hook."):
            settings[f"{section}.enabled"] = "false"
        else:
            settings |= {f"{section}.{part}": "" for part in ("clean", "smudge", "process", "required")}
    return settings


def _run(
    folder: Path, arguments: tuple[str, ...], settings: dict[str, str], timeout_s: float | None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER}
    options = []  # they win over the settings of a git that called this program, and take any name
    for place, (name, value) in enumerate(settings.items()):
        environment[f"TPME_GIT_{place}"] = value
        options.append(f"--config-env={name}=TPME_GIT_{place}")
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}  # the second: a status writes no index
    return subprocess.run(
        ["git", *options, "-C", str(folder), *arguments],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=timeout_s,
        encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip
