"""The house holds: packages under one name, imports that point one way, a command line that starts light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "methods", "reports")
ROOMS = (
    "bench",  # errors, quantities, record, workers
    "bench.measure",
    "bench.task.sources",
    "bench.task",
    "bench.imports",
    "bench.task.tiny",
    "methods",
    "bench.train",
    "bench.counting",
    "bench.recorder",
    "bench.run",
    "bench.contract",
    "bench.contract",
    "reports.data",
    "reports.tables",
    "reports.figures",
    "reports.gate",
    "reports",
    "bench.commands",
    "bench.cli",
    "bench.pytest_plugin",
)
"""From bottom to top: a room imports itself and those before it. A module is in the longest name that fits."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the three packages, without the leading ``tpme.``, with its syntax tree."""
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def own_imports() -> set[tuple[str, str]]:
    """Pairs (importing module, imported module) within the three packages, at any depth of their functions."""
    trees = dict(sources())
    pairs = set()
    for module, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in (name.removeprefix("tpme.") for name in names if name.startswith("tpme.")):
                pairs.add((module, name if name in trees else name.rpartition(".")[0]))
    assert {imported for _, imported in pairs} <= set(trees)
    return pairs


def room(module: str) -> int:
    """The place of a module's room in ``ROOMS``."""
    return ROOMS.index(max((name for name in ROOMS if f"{module}.".startswith(f"{name}.")), key=len))


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


def test_no_import_runs_up() -> None:
    """A room knows those below it alone, so there is no circle between rooms; ``bench`` itself shows what is public."""
    assert {pair for pair in own_imports() if room(pair[1]) > room(pair[0]) and pair[0] != "bench"} == set()


def test_no_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for module, other in own_imports():
        graph.setdefault(module, set()).add(other)
    assert list(graphlib.TopologicalSorter(graph).static_order())  # a circle raises, naming its modules


def test_every_room_is_there_and_has_a_place_of_its_own() -> None:
    used = {ROOMS[room(module)] for module, _ in sources()}
    assert used == set(ROOMS)
    outside = {pair for pair in own_imports() if pair[0].startswith("reports") and pair[1].startswith("bench.")}
    assert {ROOMS[room(imported)] for _, imported in outside} == {"bench"}, "reports read records, and nothing runs"


def test_one_name_is_one_class() -> None:
    places: dict[str, list[str]] = {}
    for module, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_one_name_is_one_file() -> None:
    """Commands and sources of data aside: they are named after what is typed, or after whose format they read."""
    places: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py" and path.parent.name not in ("commands", "sources"):
                places.setdefault(path.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


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
