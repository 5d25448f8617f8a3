"""Benchmarks compare two ways to do the same work within one run; no gate is an absolute time.

They use as many threads as torch does (``OMP_NUM_THREADS``). Where other programs run beside them, the fastest of
several interleaved calls is still a fair one. ``TPME_BENCH_DEVICE=cuda`` takes what a model does to a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tpme.bench.measure.clock import now, sync
from tpme.bench.task.batches import log_popularity
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.iisan import read_iisan

DEVICE = os.environ.get("TPME_BENCH_DEVICE", "cpu")
SLOWEST_STAND_IN = 1.2
"""A stand-in may take this much of what the reference takes, on a machine of one speed."""
COMPARABLE = 3.0
"""Plain code may take this many times as long here as printed; else this machine is busy, or of another kind."""
PRINTED_PLAIN_LOSS_S = 0.0015 + 0.0018
"""A plain vectorised loss at batch 64, forward and backward, on the reference's two cores."""
TURN_S = 1.5
"""What takes less is called again and again within a turn."""
DIM = 64


@dataclass(frozen=True)
class Printed:
    """Seconds printed for the reference's way on two cores, and plain code that was timed there, too: what ``work``
    takes here over ``work_s`` is how much slower this machine is."""

    seconds: float
    work: Callable[[], object]
    work_s: float


@dataclass(frozen=True)
class Compared:
    """Seconds of the fastest call of each side, and what the first call of each returned."""

    slow_s: float
    fast_s: float
    first: tuple[Any, Any]

    @property
    def ratio(self) -> float:
        return self.slow_s / self.fast_s


Say = Callable[[str], None]
Compare = Callable[..., Compared]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where models run."""
    return torch.device(DEVICE)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line of results past pytest's capture."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="")

    return line


@pytest.fixture
def note(benchmark: Any) -> Callable[..., None]:
    """``note(work, target, measured)``: a row of the table that ``scripts/benchmark_table.py`` makes."""

    def keep(work: str, target: str, measured: str, stand_in: float | None = None) -> None:
        row = {"work": work, "target": target, "measured": measured, "stand_in": stand_in}
        benchmark.extra_info.setdefault("rows", []).append(row)

    return keep


@pytest.fixture
def printed(plain_loss: Callable[[], object]) -> Callable[..., Printed]:
    """``printed(seconds)``: a figure of the reference; by default the vectorised loss of 64 users calibrates it."""
    return lambda seconds, *plain: Printed(seconds, *(plain or (plain_loss, PRINTED_PLAIN_LOSS_S)))


@pytest.fixture
def compare(benchmark: Any, say: Say, note: Callable[..., None]) -> Compare:
    """``compare(name, slow, fast, least)``: call both in turns, print their fastest times, demand the ratio ``least``.

    A slow straw man proves nothing: with ``printed`` (on a CPU), the slow side may take at most 1.2 times what is
    printed for the reference, scaled by plain code that is timed in the same turns.
    """

    def run(
        name: str,
        slow: Callable[[], object],
        fast: Callable[[], object],
        least: float,
        *,
        rounds: int = 2,
        printed: Printed | None = None,
    ) -> Compared:
        works = [slow, fast] if printed is None or DEVICE != "cpu" else [slow, fast, printed.work]
        first, (slow_s, fast_s, *calibration) = in_turns(works, rounds)
        found = Compared(slow_s, fast_s, (first[0], first[1]))
        benchmark.pedantic(lambda: (fast(), sync(DEVICE)), rounds=1)
        say(f"{name}: {_time(slow_s)} -> {_time(fast_s)}, {found.ratio:.2f}x")
        share = None
        if calibration and printed is not None:
            slower = calibration[0] / printed.work_s
            say(f"stand-in {_time(slow_s)}, printed {_time(printed.seconds)}; plain code: {slower:.2f} of its print")
            if slower <= COMPARABLE:
                share = slow_s / printed.seconds / slower
                say(f"stand-in over scaled print {share:.2f}")
            else:
                say("this machine is busy, or of another kind: nothing is claimed of the stand-in")
        note(name, f"{least:.3g}x", f"{found.ratio:.2f}x ({_time(slow_s)} / {_time(fast_s)})", share)
        assert found.ratio >= least
        assert share is None or share <= SLOWEST_STAND_IN
        return found

    return run


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def in_turns(works: Sequence[Callable[[], object]], rounds: int) -> tuple[list[Any], list[float]]:
    """What a first call of each returned, which is not timed, and seconds of the fastest call in ``rounds`` turns."""
    first = [work() for work in works]
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, times, strict=True):
            until = now(DEVICE) + TURN_S
            while True:
                start = now(DEVICE)
                work()
                end = now(DEVICE)
                taken.append(end - start)
                if end >= until:
                    break
    return first, [min(taken) for taken in times]


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
