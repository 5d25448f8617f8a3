"""Compiled training gives what plain training gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tpme.bench.errors import UserError
from tpme.bench.run import cell
from tpme.bench.train.compiling import COMPILERS, compile_model

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_rows_of_every_kind_train_alike_compiled(world: Any, tmp_path: Path) -> None:
    """Through cells: encoder layers that train, hooks on them, a side network on cached states."""
    methods = ["fft", "prompt", {"name": "iisan", "cached": True}]
    records = {}
    for compiled in (False, True):
        matrix = world.matrix(methods, modalities=["text"], training={"compile": compiled, "blocks": 1})
        results = world.run(matrix, tmp_path / str(compiled))
        assert {result.status for result in results} == {"ok"}
        records[compiled] = {result.cell.label: result for result in results}
    for label, result in records[True].items():
        plain = records[False][label]
        assert result.epochs[0].loss == pytest.approx(plain.epochs[0].loss, rel=1e-5), label
        assert result.cell.training.compile
        assert "setup-in-time" in {flag.code for flag in result.flags} - {flag.code for flag in plain.flags}


@pytest.mark.parametrize(("epochs", "flagged"), [(2, True), (3, False)])
def test_compiling_that_is_part_of_the_epoch_time_is_flagged(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, flagged: bool
) -> None:
    monkeypatch.setattr(cell, "compile_model", lambda _model: True)
    result = world.tell(world.matrix(["id"], training={"compile": True, "epochs": epochs}), tmp_path)
    assert result.warmup_epochs == (0 if flagged else 1)
    assert ("setup-in-time" in {flag.code for flag in result.flags}) == flagged


def test_a_row_in_which_nothing_trains_is_not_compiled(world: Any, tmp_path: Path) -> None:
    result = world.tell(world.matrix(["popularity"], training={"compile": True}), tmp_path)
    flags = {flag.code: flag.message for flag in result.flags}
    assert flags["not-compiled"] == "nothing trains: nothing to compile"
    assert "setup-in-time" not in flags


def test_without_a_compiler_it_says_so(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        compile_model(tiny.build("id")[1])
