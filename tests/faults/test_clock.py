"""A clock on the wall that jumps, forwards and backwards, at drawn calls: times come from another clock."""

from __future__ import annotations

import pytest
from faults.suite import Suite

pytestmark = pytest.mark.faults
DAY_S = 86400
JUMPS = tuple(f"clock {days * DAY_S}" for days in (-3650, -1, 1, 3650))
"""Kinds of faults, for the shim."""


@pytest.mark.about("clock that jumps")
@pytest.mark.parametrize("kind", JUMPS)
def test_a_jump_changes_nothing(suite: Suite, kind: str) -> None:
    wrong = []
    for role in ("launcher", "cell"):
        wrong += suite.inject(suite.drawn((role, kind)).choice(suite.calls(role, kind)))
    assert not wrong, "\n".join(wrong)
