"""One cell on several devices: real processes, connected by gloo, do in float64 what one process does."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import Case, outcome, run_ranks
from trainers import trainer_maker

from tpme.methods.base import Method
from tpme.methods.registry import BUILTIN, create

TOLERANCE = 1e-9
FEW: list[Case] = [
    {"method": "fft", "steps": 4, "evaluates": True},
    {"method": "lora", "steps": 3, "protocol": "paper", "modalities": ["text"]},
    {"method": "dyt", "steps": 3, "evaluates": True},
    {"method": "iisan", "steps": 3, "cached": True, "sharded": True},
]
SHARED = [name for name in sorted(BUILTIN) if type(create(name, {})).run is Method.run]
"""The methods that leave the procedure to the harness."""


def assert_alike(one: Any, other: Any, what: str, largest: float = 0.0) -> None:
    """Values are equal to 1e-9 of the largest of a tensor, or of ``largest``."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), what
        if what.endswith("gradients"):  # some are zero but for rounding, such as those of the biases of keys
            largest = max((float(value.abs().max()) for value in one.values()), default=0.0)
        for name in one:
            assert_alike(one[name], other[name], f"{what} {name}", largest)
        return
    one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    assert one.shape == other.shape, what
    if one.numel():
        error, largest = float((one - other).abs().max()), max(largest, float(one.abs().max()))
        assert error <= TOLERANCE * largest + 1e-15, f"{what}: {error:.2g} of {largest:.2g}"


def _without_noise(found: dict[str, Any], gradients: dict[str, torch.Tensor]) -> dict[str, Any]:
    """``found`` without the biases whose gradient is zero but for rounding: Adam moves them by that alone.

    They are those of keys, which shift all scores of a query alike.
    """
    largest = max((float(value.abs().max()) for value in gradients.values()), default=0.0)
    weights = dict(found["weights"])
    for name in weights.keys() & gradients.keys():
        if name.endswith("bias"):
            weights[name] = weights[name][gradients[name].abs() > 1e-12 * largest]
    return found | {"weights": weights}


def alone(world: Any, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What one device makes of every case, in this process."""
    torch.set_default_dtype(torch.float64)
    try:
        make = trainer_maker(world, lambda: Path(tempfile.mkdtemp()))
        return [outcome(make, case) for case in cases]
    finally:
        torch.set_default_dtype(torch.float32)


def compare(world: Any, folder: Path, cases: Sequence[Case], devices: Sequence[int]) -> None:
    """Train every case on one device and on several, and compare all that came out."""
    single = alone(world, cases)
    for number in devices:
        several = run_ranks(world, folder / str(number), cases, number)
        for case, one, other in zip(cases, single, several, strict=True):
            assert other["alike"], f"{case}: ranks differ"
            single_gradients = one.get("gradients", {})
            one, other = (_without_noise(found, single_gradients) for found in (one, other))
            assert_alike({**one, "sent": 0}, {**other, "sent": 0}, f"{dict(case)} on {number}:")


def test_two_ranks_train_as_one_device(world: Any, tmp_path: Path) -> None:
    compare(world, tmp_path, FEW, [2])


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["suite", "paper"])
def test_every_method_trains_as_on_one_device(world: Any, tmp_path: Path, protocol: str) -> None:
    cases = [{"method": name, "protocol": protocol, "evaluates": protocol == "suite"} for name in SHARED]
    compare(world, tmp_path, cases, [2, 4])


@pytest.mark.slow
def test_options_and_settings_train_as_on_one_device(world: Any, tmp_path: Path) -> None:
    cases: list[Case] = [
        {"method": "dyt", "steps": 5, "options": {"complete_loss": False}, "activation_checkpointing": True},
        {"method": "dyt", "steps": 5, "options": {"experts": 2, "dispatch_encoders": "text"}},
        {"method": "pyra", "steps": 5, "options": {"text_merge": "low"}},
        {"method": "fft", "steps": 5, "activation_checkpointing": True},
        *({"method": name, "steps": 5, "cached": True} for name in ("iisan", "lst")),
        *({"method": name, "steps": 5, "cached": True, "sharded": True} for name in ("iisan", "lst", "iisan-versa")),
    ]
    compare(world, tmp_path, cases, [2, 4])


@pytest.mark.slow
def test_sharded_encoders_train_as_whole_ones(world: Any, tmp_path: Path) -> None:
    names = ("fft", "lora", "bitfit", "dyt", "prefix", "dapt", "context-peft", "frozen", "pyra")
    cases = [{"method": name, "steps": 8, "shard": True, "devices": 2, "evaluates": True} for name in names]
    compare(world, tmp_path, cases, [2])


@pytest.mark.slow
def test_ranks_stay_alike_with_dropout(world: Any, tmp_path: Path) -> None:
    """Each draws its own, and yet what a later stage makes of random numbers is the same on all."""
    cases = [{"method": name, "steps": 4, "dropout": 0.3} for name in ("fft", "pt-peft", "dyt", "adalora")]
    cases = [case | ({"options": {"dropout": 0.3}} if case["method"] in ("dyt", "adalora") else {}) for case in cases]
    for case, found in zip(cases, run_ranks(world, tmp_path, cases, 2), strict=True):
        assert found["alike"], case


def test_a_share_names_every_item_once() -> None:
    import numpy as np

    from tpme.bench.task.dealing import Share

    class Peer:
        common = None

        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

    for size, owner in itertools.product((2, 3), (np.arange(7), np.array([1, 1, 0, 1, 0, 1, 1]))):
        shares = [Share.of(Peer(rank, size), owner % size, 9) for rank in range(size)]  # type: ignore[arg-type]
        vectors = torch.arange(len(owner))
        rows = [torch.full((share.most,), -1) for share in shares]
        for own, share in zip(rows, shares, strict=True):
            own[: len(share.rows)] = vectors[share.rows]
        assert torch.equal(torch.cat(rows)[shares[0].place], vectors)
        assert sum(share.positions for share in shares) == 9
