"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
    name = "tpme_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
