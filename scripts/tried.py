"""What else was tried, with a number for each: both ways in turns, in one run.

    python scripts/tried.py --docs docs/lab/tried.md

Steps are those of ``profile_methods.py``. About three minutes on two cores; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from profile_methods import SIZES, fastest
from torch import Tensor, nn
from workload import make_trainer, put

from tpme.bench.measure.phases import PhaseLog
from tpme.bench.task.batches import Batch, TrainBatches
from tpme.bench.train.compiling import compile_model
from tpme.bench.train.loop import Trainer

WARMUP, STEPS, AHEAD = 3, 8, 4
SHOWN, DIM = 300, 64
"""Items of a batch, and the width of their vectors."""


@dataclass(frozen=True)
class Row:
    """One thing tried: seconds without and with it."""

    tried: str
    work: str
    without_s: float
    with_s: float
    remark: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything, and print or document it."""
    parser = argparse.ArgumentParser(description="What else was tried, with a number for each.")
    parser.add_argument("--only", action="append", choices=list(TRIALS), help="this one alone; may be repeated")
    parser.add_argument("--docs", type=Path, help="document whose marked part is replaced")
    options = parser.parse_args(arguments)
    lines = ["| tried | work | without (ms) | with (ms) | time | remark |", "|---|---|---:|---:|---:|---|"]
    with tempfile.TemporaryDirectory(prefix="tpme-tried-") as folder:
        for name in options.only or TRIALS:
            started = time.perf_counter()
            for row in TRIALS[name](Path(folder)):
                cells = f"{ms(row.without_s)} | {ms(row.with_s)} | {row.with_s / row.without_s:.2f}x"
                lines.append(f"| {row.tried} | {row.work} | {cells} | {row.remark} |")
            sys.stderr.write(f"{name}: {time.perf_counter() - started:.0f} s\n")
    if options.docs is None:
        sys.stdout.write("\n".join(lines) + "\n")
    else:
        put("\n".join(lines), options.docs, "tried")
    return 0


def ms(seconds: float) -> str:
    """Milliseconds with three digits, or all before the point."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def trainer_of(label: str, folder: Path) -> Trainer:
    """What trains the row ``label`` of ``profile_methods.py``."""
    trainer = make_trainer(SIZES[label], folder, PhaseLog("cpu", None, None))
    trainer.model.train()
    return trainer


def steps_in_turns(*trainers: Trainer) -> list[list[float]]:
    """Seconds of ``WARMUP + STEPS`` training steps of each, step by step in turns."""
    epochs = [(trainer, trainer.optimizer(), trainer.batches.epoch(1)) for trainer in trainers]
    taken: list[list[float]] = [[] for _ in trainers]
    for _ in range(WARMUP + STEPS):
        for (trainer, optimizer, batches), times in zip(epochs, taken, strict=True):
            batch = next(batches)
            started = time.perf_counter()
            trainer.step(batch, optimizer)
            times.append(time.perf_counter() - started)
    return taken


def foreach(folder: Path) -> Iterator[Row]:
    """Updates by torch's multi-tensor Adam in place of the fused one."""
    for label in ("fft", "iisan (cached)"):
        trainer = trainer_of(label, folder)
        works = []
        for option in ("fused", "foreach"):
            groups = trainer.method.param_groups(trainer.model, trainer.cell.lr)
            works.append(torch.optim.Adam(groups, **{option: True}).step)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        yield Row("foreach Adam, not fused", f"update, {label}", *fastest(works, rounds=10))


def compiling(folder: Path) -> Iterator[Row]:
    """``training.compile``."""
    for number, label in enumerate(("fft", "iisan (cached)", "id")):
        # Nothing is compiled already, though all rows have the sequential encoder.
        torch.compiler.reset()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{number}")
        plain, compiled = trainer_of(label, folder), trainer_of(label, folder)
        compile_model(compiled.model)
        without, with_it = steps_in_turns(plain, compiled)
        step_s = median(with_it[WARMUP:])
        spent = sum(with_it[:WARMUP]) - WARMUP * step_s
        yield Row("`training.compile`", f"step, {label}", median(without[WARMUP:]), step_s, f"{spent:.0f} s to compile")


def half_precision(folder: Path) -> Iterator[Row]:
    """bf16 autocast on a CPU."""
    plain, half = trainer_of("fft", folder), trainer_of("fft", folder)
    half.autocast_dtype = torch.bfloat16
    without, with_it = (median(times[WARMUP:]) for times in steps_in_turns(plain, half))
    yield Row("bf16 autocast", "step, fft", without, with_it)


def prefetch(folder: Path) -> Iterator[Row]:
    """More than one batch assembled ahead."""
    trainer = trainer_of("iisan (cached)", folder)
    optimizer = trainer.optimizer()
    trainer.batches.steps = WARMUP * STEPS

    def epoch(batches: Callable[[], Iterator[Batch]]) -> None:
        for batch in batches():
            trainer.step(batch, optimizer)

    works = [lambda: epoch(lambda: trainer.batches.epoch(1)), lambda: epoch(lambda: _far_ahead(trainer.batches))]
    without, with_it = fastest(works, rounds=3)
    yield Row(f"{AHEAD} batches ahead, not 1", f"{WARMUP * STEPS} steps, iisan (cached)", without, with_it)


def _far_ahead(batches: TrainBatches) -> Iterator[Batch]:
    order = np.random.default_rng([batches.seed, 1]).permutation(len(batches.slots))
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque(pool.submit(batches._assemble, order, step) for step in range(AHEAD))
        for step in range(len(batches)):
            batch = waiting.popleft().result()
            if step + AHEAD < len(batches):
                waiting.append(pool.submit(batches._assemble, order, step + AHEAD))
            yield batch


def sparse_table(folder: Path) -> Iterator[Row]:
    """Gradient and update of the rows of an ID table that a batch shows, and of no other."""
    for items in (20_000, 1_000_000):
        works = []
        for sparse in (False, True):
            table = nn.Embedding(items + 1, DIM, sparse=sparse)
            weights = list(table.parameters())
            optimizer = torch.optim.SparseAdam(weights) if sparse else torch.optim.Adam(weights, fused=True)
            works.append(lambda table=table, optimizer=optimizer: _table_step(table, optimizer))
        remark = "other results: rows that a batch does not show stay, where Adam's moments move them on"
        yield Row("sparse gradient of the ID table", f"its step, {items:,} items", *fastest(works), remark)


def _table_step(table: nn.Embedding, optimizer: torch.optim.Optimizer) -> None:
    ids: Tensor = torch.randint(1, table.num_embeddings, (SHOWN,))
    table(ids).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


TRIALS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "foreach": foreach,
    "compile": compiling,
    "bf16": half_precision,
    "prefetch": prefetch,
    "sparse": sparse_table,
}


if __name__ == "__main__":
    sys.exit(main())
