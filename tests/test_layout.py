"""The house holds: packages under one name, imports that point one way, a command line that starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imported(folder: Path) -> set[str]:
    """Every module that the sources below ``folder`` import, at any depth of their functions."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("reports", ("torch", "transformers", "peft", "tpme.methods", "tpme.bench.task", "tpme.bench.measure")),
        ("methods", ("tpme.bench.measure", "tpme.reports", "tpme.bench.train")),
        ("bench/measure", ("tpme.bench.task", "tpme.methods", "tpme.reports")),
        ("bench/task", ("tpme.bench.run", "tpme.bench.train", "tpme.methods", "tpme.reports")),
        ("bench/train", ("tpme.bench.run", "tpme.reports")),
    ],
)
def test_imports_point_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    wrong = {n for n in imported(ROOT / folder) if any(n == f or n.startswith(f + ".") for f in forbidden)}
    assert not wrong


def test_every_package_folder_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "tpme." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("bench", "methods", "reports")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found


def test_a_users_own_reports_package_does_not_collide(tmp_path: Path) -> None:
    for name in ("reports", "bench", "methods"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    code = (
        "import reports, bench, methods, tpme.reports.data.tpme, tpme.bench.record, tpme.methods.registry;"
        "assert reports.mine and bench.mine and methods.mine"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_command_line_starts_without_heavy_imports() -> None:
    code = (
        "import sys, tpme.bench.cli;"
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
