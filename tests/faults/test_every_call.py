"""Every call that launcher, cell, builder and worker make to files fails once, in every way that it can."""

from __future__ import annotations

import pytest
from faults.conftest import ONLY
from faults.scenes import KINDS, Fault
from faults.suite import Suite
from faults.test_clock import JUMPS

ROLES = {"matrix": ("launcher", "cell"), "cache": ("builder",), "prepare": ("launcher", "worker")}
NAMES = {
    "kill before": "killed before a call",
    "kill after": "killed after a call",
    "ended": "ended by SIGTERM at a call",
    "ENOSPC": "disk full from a call on",
    "EIO": "I/O error of a call",
    "EDQUOT": "over quota at a call",
}
WAYS = [
    pytest.param(scenario, role, kind, marks=pytest.mark.about(NAMES[kind]), id=f"{scenario}-{role}-{kind}")
    for scenario, roles in ROLES.items()
    for role in roles
    for kind in KINDS
]


def every_fault(suite: Suite, *others: str) -> list[Fault]:
    """What the first test injects, and faults of ``others`` kinds."""
    kinds = *KINDS, *others
    places = [(scenario, role) for scenario, roles in ROLES.items() for role in roles]
    return [fault for place in places for kind in kinds for fault in suite.of(place[0]).faults(*place, kind)]


@pytest.mark.faults
@pytest.mark.skipif(ONLY is not None, reason="one injection is asked for")
@pytest.mark.parametrize(("scenario", "role", "kind"), WAYS)
def test_a_call_that_fails(suite: Suite, scenario: str, role: str, kind: str) -> None:
    faults = suite.of(scenario).faults(scenario, role, kind)
    assert faults, "a role that makes no call is not watched"
    wrong = [problem for fault in faults for problem in suite.inject(fault)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.about("sample of the above")
def test_a_sample(suite: Suite) -> None:
    """Twenty of them, or the one that TPME_FAULT_ONLY names, also one of other tests that make a call fail."""
    if ONLY is None:
        chosen = suite.drawn("sample").sample(every_fault(suite), 20)
    else:
        chosen = [fault for fault in every_fault(suite, "EROFS", *JUMPS) if str(fault) == ONLY]
    assert chosen, f"TPME_FAULT_ONLY={ONLY}: no such injection"
    wrong = [problem for fault in chosen for problem in suite.inject(fault)]
    assert not wrong, "\n".join(wrong)
