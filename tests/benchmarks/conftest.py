"""Benchmarks compare two ways to do the same work within one run; no gate is an absolute time.

They use as many threads as torch does (``OMP_NUM_THREADS``). Where other programs run beside them, the fastest of
several interleaved calls is still a fair one.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tpme.bench.task.batches import log_popularity
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.iisan import read_iisan

SLOWEST_STAND_IN = 1.2
"""A stand-in may take this much of what the reference takes, on a machine of one speed."""
PRINTED_PLAIN_LOSS_S = 0.0015 + 0.0018
"""A plain vectorised loss at batch 64, forward and backward, on the reference's two cores."""
DIM = 64


@dataclass(frozen=True)
class Compared:
    """Seconds of the fastest call of each side."""

    slow_s: float
    fast_s: float

    @property
    def ratio(self) -> float:
        return self.slow_s / self.fast_s


Say = Callable[[str], None]
Compare = Callable[..., Compared]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line of results past pytest's capture."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="")

    return line


@pytest.fixture
def compare(benchmark: Any, say: Say) -> Compare:
    """``compare(name, slow, fast)``: call both in turns, print and return their fastest times."""

    def run(name: str, slow: Callable[[], object], fast: Callable[[], object], rounds: int = 3) -> Compared:
        found = Compared(*in_turns((slow, fast), rounds))
        benchmark.pedantic(fast, rounds=rounds)
        benchmark.extra_info |= {"slow_s": found.slow_s, "ratio": found.ratio}
        say(f"{name}: {found.slow_s * 1e3:.2f} ms -> {found.fast_s * 1e3:.2f} ms, {found.ratio:.2f}x")
        return found

    return run


@pytest.fixture
def against_print(say: Say, plain_loss: Callable[[], object]) -> Callable[..., None]:
    """Compare a stand-in with the reference's printed figure: a slow straw man proves nothing.

    ``work`` and ``printed_work_s`` calibrate: the same plain code, timed here and printed for the reference's machine;
    by default the vectorised loss of 64 users.
    """

    def check(
        stand_in_s: float,
        printed_s: float,
        work: Callable[[], object] = plain_loss,
        printed_work_s: float = PRINTED_PLAIN_LOSS_S,
    ) -> None:
        (here_s,) = in_turns((work,), 5)
        share = stand_in_s / printed_s * printed_work_s / here_s
        say(
            f"stand-in {stand_in_s * 1e3:.4g} ms, printed {printed_s * 1e3:.4g} ms; calibration {here_s * 1e3:.3f} ms "
            f"here, {printed_work_s * 1e3:.3f} ms printed; stand-in over scaled print {share:.2f}"
        )
        assert share <= SLOWEST_STAND_IN

    return check


@pytest.fixture
def nearest_to_print(say: Say, plain_loss: Callable[[], object]) -> Callable[..., str]:
    """Of several honest ways, the name of that whose time is nearest to the printed one, scaled by the calibration."""

    def choose(name: str, works: Mapping[str, Callable[[], object]], printed_s: float) -> str:
        calibration_s, *taken_s = in_turns((plain_loss, *works.values()), 3)
        wanted_s = printed_s * calibration_s / PRINTED_PLAIN_LOSS_S
        taken = dict(zip(works, taken_s, strict=True))
        honest = [way for way in taken if taken[way] <= SLOWEST_STAND_IN * wanted_s]
        chosen = min(honest, key=lambda way: abs(taken[way] - wanted_s))
        told = ", ".join(f"{way} {seconds * 1e3:.1f}" for way, seconds in taken.items())
        say(f"{name}, ms: {told}; printed {printed_s * 1e3:.1f}, scaled {wanted_s * 1e3:.1f}: {chosen} is nearest")
        return chosen

    return choose


def in_turns(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of the fastest of ``rounds`` calls of each, after one that does not count."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(rounds):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


@pytest.fixture(scope="session")
def looped() -> ModuleType:
    """``looped.py``: the looped, padded, per-file way to do the task's work."""
    name = "tpme_benchmarks_looped"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("looped.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def scientific(shared: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The real interactions and titles of Scientific: 12,076 users, 20,314 items."""
    source, folder = shared("data", "amazon-scientific"), tmp_path_factory.mktemp("scientific") / "data"
    prepare(read_iisan(source, modalities=("text",)), folder, max_seq_len=10, image_size=224)
    return Dataset.open(folder)


@pytest.fixture(scope="session")
def plain_loss(scientific: Dataset, looped: ModuleType) -> Callable[[], object]:
    """The vectorised loss of 64 users, forward and backward: the calibration loop."""
    ids = torch.from_numpy(scientific.train_slots[:64].astype("int64"))
    log_p = torch.from_numpy(log_popularity(scientific))[ids.flatten()]
    vectors = torch.randn(ids.numel(), DIM, requires_grad=True)
    users = torch.randn(len(ids), ids.shape[1] - 1, DIM, requires_grad=True)

    def work() -> object:
        return torch.autograd.grad(looped.vectorised_loss(ids, log_p, vectors, users), (vectors, users))

    return work
