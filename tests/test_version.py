"""The version of the measured code: what changes it and what leaves it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpme.bench.run import version
from tpme.bench.run.version import code_version, sources

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project's sources that a test may change."""
    for package in ("bench", "methods", "reports"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    monkeypatch.setattr(version, "files", lambda name: tmp_path / name.removeprefix("tpme."))
    version._project_files.cache_clear()
    yield tmp_path
    version._project_files.cache_clear()


def changes(tree: Path, path: str, method: str = "methods/lora.py") -> bool:
    """Whether one more line in ``path`` changes the version of ``method``."""
    before = code_version(tree / method)
    with (tree / path).open("a") as file:
        file.write("# changed\n")
    return code_version(tree / method) != before


@pytest.mark.parametrize(
    "path",
    [
        "bench/run/cell.py",
        "bench/train/loop.py",
        "bench/counting/devices.py",  # decides MFU
        "bench/counting/exact.py",
        "bench/measure/phases.py",
        "bench/measure/sampler_process.py",  # a process of its own
        "bench/task/features.py",
        "bench/task/recommender.py",
        "methods/base.py",
        "methods/lora.py",
    ],
)
def test_what_a_cell_runs_makes_its_results_stale(tree: Path, path: str) -> None:
    assert changes(tree, path)


@pytest.mark.parametrize(
    "path",
    [
        "bench/commands/run.py",
        "bench/run/launch.py",
        "bench/run/live_cell.py",  # the hook of tpme run --log, beside the cell
        "bench/record.py",
        "bench/task/sources/synthetic.py",
        "reports/report.py",
        "reports/gate/check.py",
        "methods/iisan.py",
        "methods/parts/bottleneck.py",
        "methods/registry.py",
    ],
)
def test_what_it_does_not_run_leaves_them_valid(tree: Path, path: str) -> None:
    assert not changes(tree, path)


def test_parts_belong_to_the_methods_that_import_them(tree: Path) -> None:
    assert changes(tree, "methods/parts/bottleneck.py", "methods/adapter.py")
    assert changes(tree, "methods/parts/bottleneck.py", "methods/iisan.py")


def test_a_new_method_leaves_the_others(tree: Path) -> None:
    before = code_version(tree / "methods" / "lora.py")
    (tree / "methods" / "new.py").write_text("from tpme.methods.base import Method\n\nclass New(Method): pass\n")
    (tree / "methods" / "registry.py").write_text("BUILTIN = {'new': 'tpme.methods.new:New'}\n")
    assert code_version(tree / "methods" / "lora.py") == before
    assert code_version(tree / "methods" / "new.py") != before


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize("line", ["from ._shared import rank", "from . import _shared", "from _shared import rank"])
def test_a_helper_beside_a_method_belongs_to_it(tree: Path, line: str, package: bool) -> None:
    mine = tree / "mine"
    mine.mkdir()
    if package:
        (mine / "__init__.py").write_text("")
    (mine / "_shared.py").write_text("from ._deeper import rank\n")
    (mine / "_deeper.py").write_text("rank = 4\n")
    (mine / "_unused.py").write_text("")
    (mine / "good.py").write_text(f"{line}\n")
    (mine / "other.py").write_text("")
    assert changes(tree, "mine/_shared.py", "mine/good.py")
    assert changes(tree, "mine/_deeper.py", "mine/good.py")
    assert not changes(tree, "mine/_unused.py", "mine/good.py")
    assert not changes(tree, "mine/other.py", "mine/good.py")
    assert not changes(tree, "mine/_shared.py", "mine/other.py")


def test_modules_of_an_installed_method_belong_to_it(tree: Path) -> None:
    package = tree / "installed" / "theirs"
    package.mkdir(parents=True)
    (tree / "installed" / "elsewhere.py").write_text("")
    for name, text in {
        "__init__": "",
        "method": "from theirs.parts import rank\nimport elsewhere\n",
        "parts": "from . import numbers",
        "numbers": "",
        "other": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    reached = {path.name for path in sources(package / "method.py") if path.is_relative_to(tree / "installed")}
    assert reached == {"__init__.py", "method.py", "parts.py", "numbers.py"}


def test_it_depends_on_content_alone(tmp_path: Path) -> None:
    for folder in ("a", "z"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("METHOD = 1")
    built_in = code_version(ROOT / "methods" / "lora.py")
    assert built_in == code_version(ROOT / "methods" / "lora.py")
    assert code_version(tmp_path / "a" / "mine.py") == code_version(tmp_path / "z" / "mine.py") != built_in
    (tmp_path / "a" / "mine.py").write_text("METHOD = 2")
    assert code_version(tmp_path / "a" / "mine.py") != code_version(tmp_path / "z" / "mine.py")


def test_imports_for_types_alone_do_not_count(tmp_path: Path) -> None:
    method = tmp_path / "mine.py"
    method.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ._types import Rank\n")
    (tmp_path / "_types.py").write_text("Rank = int\n")
    assert tmp_path / "_types.py" not in sources(method)


def test_a_further_method_parses_its_own_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    version._imports.cache_clear()
    code_version(ROOT / "methods" / "lora.py")
    parsed, parse = [], ast.parse
    monkeypatch.setattr(version.ast, "parse", lambda source: parsed.append(source) or parse(source))
    code_version(ROOT / "methods" / "bitfit.py")
    assert parsed == [(ROOT / "methods" / "bitfit.py").read_bytes()]
