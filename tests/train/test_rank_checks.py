"""What several devices refuse, and how ranks that differ are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, Training
from tpme.bench.run.cell_checks import check_devices
from tpme.bench.train.agreement import _difference, check_equal
from tpme.bench.train.ranks import ENVIRONMENT, Ranks
from tpme.methods.registry import BUILTIN, create

REFUSED = {"autopeft", "fedpeptao", "ftp", "light-peft", "tpgm"}
NOT_SHARDED = {"adalora", "pt-peft"}


def check(method: str, **training: Any) -> None:
    settings = Training(**({"devices": 2} | training))
    cell = Cell(method=method, dataset="d", dataset_fingerprint="0" * 64, modalities=("text",), training=settings)
    check_devices(cell, create(method, {}))


@pytest.mark.parametrize(
    ("method", "training", "message"),
    [
        ("fft", {"devices": 8, "users_per_batch": 7}, "devices = 8, but a batch has 7 users"),
        ("id", {"cuda_graphs": True}, "cuda_graphs"),
        ("tpgm", {}, "'tpgm' has a training procedure of its own"),
        ("fft", {"shard": True, "compile": True}, "shard = true and compile"),
        ("fft", {"shard": True, "precision": "fp16"}, "fp16"),
        ("adalora", {"shard": True}, "'adalora' reads or changes weights between the steps"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(method: str, training: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(method, **training)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", sorted(BUILTIN))
def test_the_refused_methods_are_those_in_the_documents(method: str) -> None:
    for refused, training in ((REFUSED, {}), (REFUSED | NOT_SHARDED, {"shard": True})):
        if method in refused:
            with pytest.raises(UserError):
                check(method, **training)
        else:
            check(method, **training)


def test_one_device_is_never_refused() -> None:
    check("tpgm", devices=1, cuda_graphs=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "RANK is not set"),
        (dict.fromkeys(ENVIRONMENT, "x"), "must be whole numbers"),
        (dict.fromkeys(ENVIRONMENT, "1"), "is rank 1 of 1"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "is rank 0 of 3"),
    ],
)
def test_a_process_that_was_not_started_as_a_rank(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        Ranks.join(2, "cpu")
    assert "\n" not in str(error.value)


def test_an_address_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpme.bench.train.ranks.JOIN_S", 1.0)
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"rank 1 of 2 cannot join the others at 127.0.0.1:9") as error:
        Ranks.join(2, "cpu")
    assert "\n" not in str(error.value)


def test_the_first_parameter_that_differs_is_named() -> None:
    assert _difference([{"a": 1, "b": 2}, {"a": 1, "b": 2}]) is None
    assert "'b' differs between rank 0 and rank 1" in str(_difference([{"a": 1, "b": 2}, {"a": 1, "b": 3}]))
    assert "'c' differs between rank 0 and rank 2" in str(_difference([{"a": 1}, {"a": 1}, {"a": 1, "c": 3}]))
    check_equal(torch.nn.Linear(2, 2), Ranks.alone())
