"""What the console says of a cell that has ended."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tpme.bench.run.progress import Screen, without_total
from tpme.reports.data.columns import row_of

UNFREEZES = """
def adapt(self, model, schedule):
    model.encoders.requires_grad_(True)
"""


def said(result: Any) -> str:
    console = Console(file=io.StringIO(), width=300)
    Screen(console, 1).print_outcome(result, Path("attempt-1.log"))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_epochs_of_a_part_of_a_procedure_are_counted_without_a_total() -> None:
    assert without_total("epoch 31/2") == "epoch 31"
    assert without_total("epoch 2/2") == "epoch 2/2"
    assert without_total("validate") == "validate"


def test_a_method_that_trains_nothing_is_flagged_unless_it_is_a_baseline(run_cell: Callable[..., Any]) -> None:
    frozen = run_cell("pass")
    assert set(frozen.parameters.by_group) == {"recommender"}
    assert "trains no parameter of its own" in said(frozen)
    assert [code for code, _ in row_of(frozen, "here", None)["flags"]][-1] == "trains-nothing"
    baseline = run_cell("baseline = True")
    assert baseline.parameters == frozen.parameters
    assert "trains no parameter" not in said(baseline)
    assert "trains-nothing" not in [code for code, _ in row_of(baseline, "here", None)["flags"]]


def test_a_method_that_trains_is_not_flagged(run_cell: Callable[..., Any]) -> None:
    trained = run_cell(UNFREEZES)
    assert trained.parameters.trainable_max > trained.parameters.by_group["recommender"]
    assert trained.untrained is None
