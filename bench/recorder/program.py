"""The program whose training is recorded: its version, its git revision, its packages, its rank."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from tpme.bench.git import run_git
from tpme.bench.measure.environment import environment
from tpme.bench.record import Environment

PACKAGES = ("accelerate", "trl", "lightning", "pytorch-lightning", "datasets", "bitsandbytes", "deepspeed")
"""Further ones that can change a result; ``tpme.bench.measure.environment`` has those of the suite."""


def script() -> Path | None:
    """The file of the running program; None for a notebook or a prompt."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(file).resolve() if file else None


def script_version() -> str:
    """12 hex digits of SHA-256 over the running program's own file; without one, over nothing."""
    file = script()
    return hashlib.sha256(file.read_bytes() if file and file.is_file() else b"").hexdigest()[:12]


def program_environment(device: torch.device, processes: int) -> Environment:
    """The environment of this process, with the git state of the program in place of that of the suite.

    Runs of several processes are comparable with runs of as many alone: their number is part of ``device_key``.
    """
    found = environment(device)
    revision, dirty = _git_state()
    return found.model_copy(
        update={
            "packages": found.packages | {name: version for name in PACKAGES if (version := _version(name))},
            "git_revision": revision,
            "git_dirty": dirty,
            "device_key": found.device_key + (f", {processes} processes" if processes > 1 else ""),
        }
    )


def rank() -> int:
    """Of this process among those that train together; 0 where it trains alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK")  # the latter are Lightning's
    return max(_number(name, 0) for name in names)


def world_size() -> int:
    """How many processes train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return _number("WORLD_SIZE", 1)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else default


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """Git revision of the repository that tracks the program, and whether tracked files of it differ."""
    file = script()
    if file is None or _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    revision, changed = _git(file.parent, "rev-parse", "HEAD"), _git(file.parent, "status", "--porcelain", "-uno")
    return revision, None if changed is None else bool(changed)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = run_git(folder, *arguments, timeout_s=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
