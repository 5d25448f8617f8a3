"""The rows of all methods, as parameters ``(method, cached)`` of a test."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from tpme.methods.registry import BUILTIN, create


def method_rows(fast: Collection[str]) -> list[Any]:
    """Every built-in method, and cached where it can be without an encoder; those not named in ``fast`` are slow."""
    rows = []
    for name in sorted(BUILTIN):
        method = create(name, {})
        for cached in (False, True)[: 1 + (method.decoupled and method.modalities is None)]:
            rows.append(pytest.param(name, cached, marks=() if name in fast else pytest.mark.slow))
    return rows
