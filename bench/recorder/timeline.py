"""The phases of a recorded training: what the loop names, and ``load`` before and ``other`` between them."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from tpme.bench.errors import UserError, nearest
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import PhaseKind
from tpme.bench.recorder.stretches import Steps, TimeOf

KINDS: tuple[PhaseKind, ...] = ("load", "prepare", "train", "validate", "export", "inference", "count", "other")
"""Kinds that a training loop may name; ``export`` is saving."""
CALLED = {"eval": "validate", "evaluate": "validate", "test": "validate", "save": "export", "training": "train"}
"""What loops call some of them."""


class Recording(Protocol):
    """What a callback needs of a Recorder."""

    timeline: Timeline | None
    seed: int | None

    def model(self, model: nn.Module) -> None:
        """Count its parameters."""

    def metric(self, name: str, value: float | Tensor, *, higher_is_better: bool) -> None:
        """Record a quality."""

    def flag(self, code: str, message: str) -> None:
        """Say what a reader must know."""


class Stop(NamedTuple):
    """Where an error ended a phase."""

    error: BaseException
    phase: str
    epoch: int | None
    step: int | None
    """Training step of that epoch, from 1; None outside training."""


class Timeline:
    """One phase is open at any time, so nothing that lies between two training phases is counted as training.

    Args:
        log: of the instruments, which run. device: where the training runs. time_of: what T is the time of.
    """

    def __init__(self, log: PhaseLog, device: torch.device, time_of: TimeOf) -> None:
        self.log, self.steps = log, Steps(device, time_of)
        self.open: PhaseKind | None = None
        """Kind of the phase that the loop has named; None between its phases."""
        self.failure: Stop | None = None
        """Of the last error."""
        self.epoch = 0
        """Of the training phase that is open, or was last."""
        self._name = ""
        self._phase: AbstractContextManager[None] | None = None
        self._enter("load", "before the first phase")

    def begin(self, kind: str, epoch: int | None = None, name: str = "") -> None:
        """Begin a phase that the loop names. Raises UserError for an unknown kind, and where one is open."""
        known = kind_of(kind)
        if self.open is not None:
            raise UserError(f"phases cannot nest: '{kind}' begins while '{self._name or self.open}' is open")
        if known == "train" and epoch is None and self.steps.time_of.unit == "epoch":
            raise UserError(
                "phase('train') needs the number of its epoch, epoch=1; without epochs, Recorder(time_of='250 steps')"
            )
        if epoch is not None and (not isinstance(epoch, int) or epoch < 1):
            raise UserError(f"epochs are numbered from 1: epoch={epoch!r}")
        self._leave(None)
        self._enter(known, name or (f"epoch {epoch}" if epoch is not None else ""))
        self.open = known
        if known == "train":
            self.epoch = epoch or 0
            self.steps.begin(self.epoch)

    def end(self, error: BaseException | None = None) -> None:
        """End it; with an error, what trained in it does not count."""
        if self.open is not None:
            self._leave(error)
            self._enter("other", "")

    def step(self, loss: Tensor | float | None, samples: int) -> None:
        """End an optimiser step. Raises UserError outside training phases."""
        if self.open != "train":
            raise UserError(
                "a step outside a training phase: call run.step() within 'with run.phase(\"train\", epoch=1)'"
            )
        self.steps.step(loss, samples)

    def finish(self, error: BaseException | None) -> None:
        """End the phase that is open, whichever it is."""
        self._leave(error)

    def _enter(self, kind: PhaseKind, name: str) -> None:
        self._name = f"{kind} {name}".strip()
        self._phase = self.log.phase(kind, name)
        self._phase.__enter__()

    def _leave(self, error: BaseException | None) -> None:
        phase, was_open = self._phase, self.open
        self._phase, self.open = None, None
        assert phase is not None
        if error is None:
            phase.__exit__(None, None, None)
        else:
            if self.failure is None or self.failure.error is not error:  # else it ended the phase before, too
                step = self.steps.in_flight if was_open == "train" else None
                self.failure = Stop(error, self._name, self.epoch or None, step)
            phase.__exit__(type(error), error, error.__traceback__)
        if was_open == "train":
            wall_s = self.log.phases[-1].wall_s
            # The device may be lost: reading the losses of a failed phase must not hide the cause.
            with contextlib.suppress(*([RuntimeError] if error is not None else [])):
                self.steps.end(wall_s, failed=error is not None)


def kind_of(word: str) -> PhaseKind:
    """The kind of phase that a loop names. Raises UserError for an unknown one."""
    kind = CALLED.get(word, word)
    for known in KINDS:
        if kind == known:
            return known
    hint = nearest(str(word), [*KINDS, *CALLED])
    also = f"did you mean '{hint}'? " if hint else ""
    own = " (that one is a method's own)" if word in get_args(PhaseKind) else ""
    raise UserError(f"no phase is called {word!r}{own}; {also}there are {', '.join(KINDS)}")
