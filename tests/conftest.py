"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
