"""One cell on several devices: real processes, connected by gloo, do in float64 what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranked import Case, run_ranks

TOLERANCE = 1e-9
FEW: list[Case] = [
    {"method": "fft", "steps": 6, "evaluates": True},
    {"method": "lora", "steps": 6, "protocol": "paper"},
    {"method": "dyt", "steps": 6, "evaluates": True},
]


def assert_alike(one: Any, other: Any, what: str) -> None:
    """Values are equal to 1e-9 of the largest of a tensor."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for name in one:
            assert_alike(one[name], other[name], f"{what} {name}")
        return
    one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    assert one.shape == other.shape, what
    if one.numel():
        error, largest = float((one - other).abs().max()), float(one.abs().max())
        assert error <= TOLERANCE * largest + 1e-15, f"{what}: {error:.2g} of {largest:.2g}"


def compare(world: Any, folder: Path, cases: list[Case], devices: int) -> None:
    single, several = (run_ranks(world, folder / str(n), cases, n) for n in (1, devices))
    for case, one, other in zip(cases, single, several, strict=True):
        assert other.pop("alike"), f"{case}: ranks differ"
        one.pop("alike")
        assert_alike(one, other, f"{case}")


def test_two_ranks_train_as_one_device(world: Any, tmp_path: Path) -> None:
    compare(world, tmp_path, FEW, 2)
