"""Trainers of small cells, in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from trainers import trainer_maker

from tpme.bench.train.loop import Trainer

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="session")
def make_trainer(world: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeTrainer:
    """``trainer_maker`` on the small world."""
    make = trainer_maker(world, lambda: tmp_path_factory.mktemp("procedure"))
    gc.freeze()  # each phase collects garbage; the libraries need not be walked each time
    return make
