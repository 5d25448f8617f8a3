"""Measure changes that were tried: with and without each, in turns, in one run.

    python scripts/tried.py --docs docs/lab/tried.md

Steps are those of ``profile_methods.py``. Takes about three minutes on two otherwise idle cores.
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
BATCH_ITEMS, DIM = 300, 64
"""Items in a batch, and the width of their vectors."""


@dataclass(frozen=True)
class Row:
    """One change: seconds without and with it."""

    tried: str
    work: str
    without_s: float
    with_s: float
    remark: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the changes, and print or document them."""
    parser = argparse.ArgumentParser(description="Measure changes that were tried.")
    parser.add_argument("--only", action="append", choices=list(TRIALS), help="only this change; may be repeated")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
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
    """Milliseconds with three significant digits, or all digits before the point."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def trainer_of(label: str, folder: Path) -> Trainer:
    """The trainer of row ``label`` of ``profile_methods.py``."""
    trainer = make_trainer(SIZES[label], folder, PhaseLog("cpu", None, None))
    trainer.model.train()
    return trainer


def steps_in_turns(*trainers: Trainer) -> list[list[float]]:
    """Seconds of ``WARMUP + STEPS`` training steps of each trainer, taking turns step by step."""
    epochs = [(trainer, trainer.optimizer(), trainer.loader.epoch(1)) for trainer in trainers]
    step_s: list[list[float]] = [[] for _ in trainers]
    for _ in range(WARMUP + STEPS):
        for (trainer, optimizer, batches), times in zip(epochs, step_s, strict=True):
            batch = next(batches)
            started = time.perf_counter()
            trainer.step(batch, optimizer)
            times.append(time.perf_counter() - started)
    return step_s


def foreach(folder: Path) -> Iterator[Row]:
    """Update with torch's multi-tensor Adam in place of the fused one."""
    for label in ("fft", "iisan (cached)"):
        trainer = trainer_of(label, folder)
        updates = []
        for option in ("fused", "foreach"):
            groups = trainer.method.param_groups(trainer.model, trainer.cell.lr)
            updates.append(torch.optim.Adam(groups, **{option: True}).step)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        yield Row("foreach Adam, not fused", f"update, {label}", *fastest(updates, rounds=10))


def compiling(folder: Path) -> Iterator[Row]:
    """``training.compile``."""
    for number, label in enumerate(("fft", "iisan (cached)", "id")):
        # Forget what was compiled for the previous row: all rows share the sequential encoder.
        torch.compiler.reset()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{number}")
        plain, compiled = trainer_of(label, folder), trainer_of(label, folder)
        compile_model(compiled.model)
        without, with_it = steps_in_turns(plain, compiled)
        step_s = median(with_it[WARMUP:])
        compile_s = sum(with_it[:WARMUP]) - WARMUP * step_s
        yield Row(
            "`training.compile`", f"step, {label}", median(without[WARMUP:]), step_s, f"{compile_s:.0f} s to compile"
        )


def half_precision(folder: Path) -> Iterator[Row]:
    """bf16 autocast on a CPU."""
    plain, half = trainer_of("fft", folder), trainer_of("fft", folder)
    half.autocast_dtype = torch.bfloat16
    without, with_it = (median(times[WARMUP:]) for times in steps_in_turns(plain, half))
    yield Row("bf16 autocast", "step, fft", without, with_it)


def prefetch(folder: Path) -> Iterator[Row]:
    """Assemble more than one batch ahead."""
    trainer = trainer_of("iisan (cached)", folder)
    optimizer = trainer.optimizer()
    trainer.loader.steps = WARMUP * STEPS

    def epoch(batches: Callable[[], Iterator[Batch]]) -> None:
        for batch in batches():
            trainer.step(batch, optimizer)

    epochs = [lambda: epoch(lambda: trainer.loader.epoch(1)), lambda: epoch(lambda: _prefetch(trainer.loader))]
    without, with_it = fastest(epochs, rounds=3)
    yield Row(f"{AHEAD} batches ahead, not 1", f"{WARMUP * STEPS} steps, iisan (cached)", without, with_it)


def _prefetch(batches: TrainBatches) -> Iterator[Batch]:
    order = np.random.default_rng([batches.seed, 1]).permutation(len(batches.slots))
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque(pool.submit(batches._assemble, order, step) for step in range(AHEAD))
        for step in range(len(batches)):
            batch = waiting.popleft().result()
            if step + AHEAD < len(batches):
                waiting.append(pool.submit(batches._assemble, order, step + AHEAD))
            yield batch


def sparse_table(folder: Path) -> Iterator[Row]:
    """Gradient and update of only those rows of an ID table that occur in the batch."""
    for items in (20_000, 1_000_000):
        steps = []
        for sparse in (False, True):
            table = nn.Embedding(items + 1, DIM, sparse=sparse)
            weights = list(table.parameters())
            optimizer = torch.optim.SparseAdam(weights) if sparse else torch.optim.Adam(weights, fused=True)
            steps.append(lambda table=table, optimizer=optimizer: _table_step(table, optimizer))
        remark = "other results: rows outside the batch stay, whereas Adam's moments move them"
        yield Row("sparse gradient of the ID table", f"its step, {items:,} items", *fastest(steps), remark)


def _table_step(table: nn.Embedding, optimizer: torch.optim.Optimizer) -> None:
    ids: Tensor = torch.randint(1, table.num_embeddings, (BATCH_ITEMS,))
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
