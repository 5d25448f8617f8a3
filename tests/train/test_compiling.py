"""Compiled training gives what plain training gives."""

from __future__ import annotations

import shutil
from types import ModuleType

import pytest
import torch

from tpme.bench.errors import UserError
from tpme.bench.train.compiling import COMPILERS, compile_model

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_losses_stay_what_they_were(tiny: ModuleType) -> None:
    losses = {}
    for compiled in (False, True):
        method, model = tiny.build("iisan", dropout=0.1)
        if compiled:
            compile_model(model)
        torch.manual_seed(5)
        losses[compiled] = tiny.train(method, model, steps=3)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][0] != losses[True][-1]


def test_without_a_compiler_it_says_so(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        compile_model(tiny.build("id")[1])
