"""Fixtures for all tests."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Workers of pytest-xdist share the cores; what they start inherits this. Set before torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A runner in the background may have signals ignored, and every program that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a GPU as ``alone``, and what needs the run of every card method as ``slow``."""
    for item in items:
        if "card_run" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") is not None:
            item.add_marker("alone")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Succeed where a selection by path or ``-k`` leaves one of the two steps of tox without tests."""
    narrowed = session.config.option.keyword or session.config.args_source is pytest.Config.ArgsSource.ARGS
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.option.markexpr and narrowed:
        session.exitstatus = pytest.ExitCode.OK


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch, so that no test depends on those before it, and skip ``gpu`` where there is none."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``script(name)``: one of ``scripts/``, which import each other as files of one folder."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


@pytest.fixture(scope="session", autouse=True)
def _empty_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and what they start, see neither the user's store nor compiled kernels of earlier runs.

    torch.compile reuses kernels that were compiled for another instruction set (``ATEN_CPU_CAPABILITY``): those for
    AVX-512, reused under avx2, gave NaN or crashed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPME_STORE", str(tmp_path_factory.mktemp("store")))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    """``shared("golden", "x.npz")``: real input from the folder ``shared`` beside the project.

    Skips the calling test, saying so, where it does not exist.
    """

    def locate(*parts: str) -> Path:
        path = ROOT.parent.joinpath("shared", *parts)
        if not path.exists():
            pytest.skip(f"needs real input that is not part of the project: {'/'.join(('shared', *parts))} is absent")
        return path

    return locate


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """``tests/tiny.py``: small encoders, data and recommenders. Loaded here, so that tests without torch stay so."""
    return _helper("tiny")


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """``tests/harness.py``: matrices, cells and the command line on a small world."""
    return _helper("harness")


@pytest.fixture(scope="session")
def world(harness: ModuleType, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two tiny random encoders and a prepared catalogue: the ``World`` of ``tests/harness.py``."""
    return harness.make_world(tmp_path_factory.mktemp("world"), tiny)


@pytest.fixture(scope="session")
def planned(harness: ModuleType, world: Any) -> Any:
    """``planned(["fft"], training=..., devices=2)``: the plan of a matrix of the small world."""
    from tpme.bench.run.plan import MatrixPlan, plan_matrix

    def make(methods: list[Any], *, training: dict[str, Any] | None = None, **settings: Any) -> MatrixPlan:
        matrix = world.matrix(methods, training=training or {})
        return plan_matrix(matrix, store=world.store, console=harness.quiet(), **settings)

    return make


@pytest.fixture(scope="session")
def card_run(harness: ModuleType, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in which every card method has run once, iisan also cached: (matrix, folder, results by label)."""
    methods = [name if name != "iisan" else {"name": name, "cached": [False, True]} for name in harness.CARD_METHODS]
    matrix, folder = world.matrix(methods, training={"epochs": 2}), tmp_path_factory.mktemp("run")
    own = replace(world, store=tmp_path_factory.mktemp("store"))  # its caches are built by its own cells
    return matrix, folder, {result.cell.label: result for result in own.run(matrix, folder)}


@pytest.fixture
def run_cell(world: Any, harness: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Run a cell of a method whose class body is given, in this process."""

    def call(body: str, **changes: Any) -> Any:
        # A name of its own each time: modules are imported once.
        name = f"{tmp_path.name}_{len(list(tmp_path.glob('methods/*.py')))}"
        harness.write_method(tmp_path / "methods", name, body)
        matrix = world.matrix([name], **({"modalities": ["text"]} | changes))
        return world.tell(matrix, tmp_path / "cell", methods_path=(tmp_path / "methods",))

    return call


def _helper(module: str) -> ModuleType:
    name = f"tpme_tests_{module}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{module}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
