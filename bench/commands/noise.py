"""``tpme doctor --noise``: how much runs of the same code differ on this device, and what the harness costs.

A/A: one small cell, run repeatedly as ``tpme run`` does, each time in a new process. What then differs is
the machine, so no difference of that size between two rows or two revisions says anything about them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from tpme.bench.claims import scratch_folder
from tpme.bench.counting.devices import DeviceNoise, calibrate, keep_profile, known_profile, profile_key
from tpme.bench.errors import UserError
from tpme.bench.measure.clock import sync
from tpme.bench.measure.host import release_free_memory
from tpme.bench.measure.phases import measuring
from tpme.bench.run.cell import CellRun
from tpme.bench.run.launch import make_jobs, run_matrix
from tpme.bench.run.matrix import MatrixFile
from tpme.bench.train.loop import Trainer
from tpme.bench.train.step import forward
from tpme.bench.train.timing import StepTimer
from tpme.reports.gate.baseline import NOISE_QUANTILE, noise
from tpme.reports.gate.measures import read_records

RUNS, ROUNDS = 6, 12
"""Of the same cell; of the harness and the bare loop."""
MATRIX = MatrixFile.model_validate(
    {
        "name": "noise",
        "datasets": [{"name": "synthetic", "synthetic": {"users": 1000}}],
        "encoders": [{"text": {"source": "builtin:tiny-text"}, "image": {"source": "builtin:tiny-image"}}],
        "methods": [{"name": "lora"}],
        "training": {"epochs": 3, "title_tokens": 14, "max_steps_per_epoch": 16, "users_per_batch": 16},
    }
)


def measure_noise(device: str, store: Path, console: Console, matrix: MatrixFile = MATRIX) -> DeviceNoise:
    """Measure ``device`` by the one cell of ``matrix`` and keep the result in its profile (about two minutes).

    Raises UserError where that cell does not end well.
    """
    with scratch_folder("noise") as (folder, _):
        runs = [folder / str(number) for number in range(RUNS)]
        for run in runs:
            [result] = run_matrix(matrix, run, store=store, device=device, console=console)
            if result.failure is not None:
                raise UserError(f"the noise floor cannot be measured: {result.status}, {result.failure.message}")
        spread = noise(read_records(runs))
        [job] = make_jobs(matrix, runs[0], store, device=device, console=console)
        with measuring(device) as phases:
            trainer = CellRun(job, phases, lambda _what, _share: None).prepare()
        overhead = overhead_ratio(trainer)
    if spread.time is None or not spread.memory or result.environment is None:
        raise UserError("the noise floor cannot be measured: its runs have no step times or no memory that can be read")
    device_noise = DeviceNoise(
        noise_time_ratio=spread.time,
        noise_memory_ratio=max(spread.memory.values()),
        overhead_ratio=overhead,
        source=f"{RUNS} A/A runs of a small cell: {NOISE_QUANTILE:.0%} quantile of {spread.pairs} pairs",
    )
    key = profile_key(result.environment)
    profile = known_profile(key, store) or calibrate(device, name=key)
    keep_profile(profile.model_copy(update={"noise": device_noise}), store)
    return device_noise


def overhead_ratio(trainer: Trainer, rounds: int = ROUNDS) -> float:
    """What the harness with all its instruments adds to an epoch, relative to a bare loop over the same batches.

    Both take turns and begin without free memory at hand. Of each step the fastest run counts, because what else the
    machine does only ever adds.
    """
    optimizer = trainer.optimizer()
    trainer.state.epoch = 1
    bare, steps, around = [], [], []
    for _ in range(rounds):
        release_free_memory()
        bare.append(_bare_epoch(trainer, optimizer))
        with measuring(trainer.device) as trainer.phases:
            with trainer.phases.phase("warmup"):  # starting the instruments is no part of an epoch
                pass
            trainer.outcome.step_s.clear()
            trainer.train_epoch(optimizer, "epoch 1")
            steps.append(list(trainer.outcome.step_s))
            around.append(trainer.phases.phases[-1].wall_s - sum(steps[-1]))
    harness_s = float(np.min(steps, axis=0).sum()) + min(around)
    return harness_s / float(np.min(bare, axis=0).sum()) - 1


def _bare_epoch(trainer: Trainer, optimizer: torch.optim.Optimizer) -> list[float]:
    """Seconds of each step of the plainest loop that trains the same model on the same batches."""
    trainer.model.train()
    timer = StepTimer(trainer.device)
    timer.start()
    for batch in trainer.loader.epoch(1):
        with trainer.autocast():
            loss = forward(trainer.method, trainer.model, batch).loss
        trainer.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        trainer.scaler.step(optimizer)
        trainer.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        timer.lap()
    sync(trainer.device)
    return timer.seconds()
