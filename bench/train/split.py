"""Where the time of a training step goes: waiting for data, forward pass, backward pass, optimiser.

Where several ranks train a cell, a further part, waiting for the others and for what they send, is inside the forward
and backward passes.

Measured in a few more steps after training, because marks inside every step would be part of the training time. They
repeat the last step of training on other batches, and leave everything as training has left it.
"""

from __future__ import annotations

import itertools

import numpy as np

from tpme.bench.errors import one_line
from tpme.bench.measure.clock import now
from tpme.bench.record import Reading
from tpme.bench.train.loop import Trainer
from tpme.bench.train.preserve import preserved
from tpme.bench.train.timing import StepTimer

PARTS = ("data_wait_s", "forward_s", "backward_s", "update_s")
COLLECTIVES = "collective_s"
"""Time in collectives, within the forward and backward passes; a part only where there are several ranks."""
WARMUP, FEWEST, MOST = 2, 3, 10
"""Steps that are not counted (the optimiser sets up its state), and bounds of those that are."""
SHARE, ALWAYS_S = 0.03, 1.0
"""Share of the training time that these steps may take; short runs may take ``ALWAYS_S`` seconds."""


def step_split(trainer: Trainer) -> dict[str, Reading]:
    """Medians of the four parts of a step; call it after training, in a phase of kind ``count``.

    On a GPU the parts are times between CUDA events on the device: waiting for data is time in which it was idle. The
    method's hooks count where they are called.
    """
    spent, parts = trainer.outcome.step_s, parts_of(trainer)
    source = f"median of up to {MOST} steps after training, " + (
        "CUDA events" if trainer.device.type == "cuda" else "wall clock"
    )
    if not spent:
        return dict.fromkeys(parts, Reading.missing(source, "no training step was finished"))
    budget_s = max(SHARE * sum(spent), ALWAYS_S)
    steps = trainer.ranks.from_first(min(int(budget_s / np.median(spent)) - WARMUP, MOST))
    if steps < FEWEST:
        reason = f"only {len(spent)} steps were trained: timing more takes over {SHARE:.0%} of their time"
        return dict.fromkeys(parts, Reading.missing(source, reason))
    laps = np.array(_laps(trainer, WARMUP + steps)).reshape(-1, len(parts))[WARMUP:]
    source = source.replace(f"up to {MOST}", str(len(laps)))
    return {
        name: Reading(value=float(value), source=source)
        for name, value in zip(parts, np.median(laps, axis=0), strict=True)
    }


def guarded_split(trainer: Trainer) -> dict[str, Reading]:
    """``step_split`` in a phase; after training, so any failure costs these readings alone.

    Of several ranks one that fails would leave the others waiting for it, so there it fails the cell.
    """
    try:
        with trainer.phases.phase("count", "parts of a step"):
            trainer.progress("parts of a step", 0.0)
            return step_split(trainer)
    except Exception as error:
        if trainer.ranks.size > 1:
            raise
        return dict.fromkeys(parts_of(trainer), Reading.missing("steps after training", one_line(error)))


def parts_of(trainer: Trainer) -> tuple[str, ...]:
    """The parts of a step."""
    return PARTS if trainer.ranks.size == 1 else (*PARTS, COLLECTIVES)


def _laps(trainer: Trainer, steps: int) -> list[list[float]]:
    """Seconds of every part, of each of ``steps`` steps."""
    waits: list[StepTimer] = []
    timer, last = StepTimer(trainer.device), max(0, trainer.state.step - 1)
    # Of several epochs where one has fewer batches.
    batches = itertools.chain.from_iterable(trainer.loader.epoch(trainer.state.epoch) for _ in itertools.count())
    with preserved(trainer):
        optimizer = trainer.optimizer()
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # what follows depends on these weights: they may diverge
        trainer.model.train()
        timer.start()
        for batch in itertools.islice(batches, steps):
            trainer.state.step = last  # a method's schedule ends there
            timer.lap()
            if trainer.ranks.size > 1:
                trainer.ranks.timer = StepTimer(trainer.device)
                waits.append(trainer.ranks.timer)
            trainer.step(batch, optimizer, timer.lap)
            timer.lap()
        trainer.ranks.timer = None
        now(trainer.device)
    laps = [timer.seconds()[start : start + len(PARTS)] for start in range(0, len(PARTS) * steps, len(PARTS))]
    # Every second lap of these is between two collectives.
    return [[*own, sum(wait.seconds()[::2])] for own, wait in zip(laps, waits, strict=True)] if waits else laps
