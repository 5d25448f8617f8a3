"""The contract suite itself: every wrong method fails, by the name of the check that it names in ``FAILS``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tpme.bench.contract.checks import CHECKS, SLOW_CHECKS, Check, run_check, subjects_of
from tpme.bench.train.compiling import COMPILERS
from tpme.methods.registry import method_class

WRONG = Path(__file__).with_name("wrong")
BY_NAME: dict[str, Check] = {check.__name__: check for check in (*CHECKS, *SLOW_CHECKS)}


def failures() -> list[tuple[str, str]]:
    """Pairs of a wrong method and a check that it must fail."""
    pairs = []
    for path in sorted(WRONG.glob("*.py")):
        fails = sys.modules[method_class(path.stem, [WRONG]).__module__].FAILS
        pairs += [(path.stem, check) for check in ([fails] if isinstance(fails, str) else fails)]
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), failures())
def test_a_wrong_method_fails_by_name(name: str, check: str, contract_world: Any) -> None:
    if BY_NAME[check] in SLOW_CHECKS and not any(map(shutil.which, COMPILERS)):
        pytest.skip("there is no C++ compiler")
    results = (run_check(BY_NAME[check], s) for s in subjects_of(contract_world, name, methods_path=[WRONG]))
    failed = next((result for result in results if result.status == "failed"), None)
    assert failed is not None, f"{name} passes {check}"
    assert failed.check == check
    assert failed.message
    assert "\n" not in str(failed)


def test_every_check_catches_a_wrong_method() -> None:
    assert {check for _, check in failures()} == set(BY_NAME)
