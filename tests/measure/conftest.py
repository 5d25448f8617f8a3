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
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=120
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run
