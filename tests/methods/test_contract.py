"""What every method must keep, whoever wrote it: the checks of ``bench/contract`` over the built-in methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Tried, names, tried

from tpme.bench.contract.checks import CHECKS, SLOW_CHECKS, Check, run_check
from tpme.bench.contract.world import PAIRS


def conclude(check: Check, subject: Any) -> None:
    result = run_check(check, subject)
    if result.status == "skipped":
        pytest.skip(result.message)
    assert result.status == "passed", result


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("of", tried(), ids=str)
def test_contract(check: Check, of: Tried, subject_of: Callable[..., Any]) -> None:
    conclude(check, subject_of(of))


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", names())
def test_contract_of_compiled_models(check: Check, name: str, subject_of: Callable[..., Any]) -> None:
    conclude(check, subject_of(Tried(name)))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("pair", PAIRS[1:], ids=" + ".join)
@pytest.mark.parametrize("name", names())
def test_contract_on_other_encoders(
    check: Check, name: str, pair: tuple[str, str], subject_of: Callable[..., Any]
) -> None:
    conclude(check, subject_of(Tried(name), pair))
