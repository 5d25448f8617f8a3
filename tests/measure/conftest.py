"""Fixtures for the instruments."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

MIB = 1 << 20


@pytest.fixture
def fresh() -> Callable[[str], Any]:
    """Run a piece of Python in a process of its own, small and without history; returns the JSON it prints last."""

    def run(code: str) -> Any:
        told = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=120
        )
        assert told.returncode == 0, told.stderr
        return json.loads(told.stdout.splitlines()[-1])

    return run
