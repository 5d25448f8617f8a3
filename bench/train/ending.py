"""How a failed cell ends: the status that an exception stands for, and what the record says about it."""

from __future__ import annotations

import re

import torch

from tpme.bench.errors import LONGEST_MESSAGE, UserError
from tpme.bench.record import Failure, Status
from tpme.bench.task.ranking import NonFiniteScoreError
from tpme.bench.train.epochs import DivergedError
from tpme.bench.train.loop import Trainer

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# The CPU's allocator, cuBLAS and the CUDA runtime itself raise a plain RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


class TimeLimitReached(BaseException):
    """The launcher has asked the cell to end. Not an Exception, so a method's ``except Exception`` cannot catch it."""


def status_of(error: BaseException) -> Status:
    """The status of a cell that ``error`` ended."""
    if isinstance(error, TimeLimitReached):
        return "timeout"
    if isinstance(error, (DivergedError, NonFiniteScoreError)):
        return "diverged"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "oom"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
        return "oom"
    return "error"


def failure_of(error: BaseException, phase: str, trainer: Trainer | None) -> Failure:
    """Where it happened and one line about it, as the record keeps them."""
    message = " ".join(str(error).split())
    if not isinstance(error, (UserError, DivergedError, NonFiniteScoreError, TimeLimitReached)):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return Failure(
        phase=phase,
        message=message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 4] + " ...",
        epoch=(trainer.state.epoch or None) if trainer else None,
        step=error.step if isinstance(error, DivergedError) else trainer.step_of_epoch if trainer else None,
        bytes_requested=bytes_requested(message) if status_of(error) == "oom" else None,
    )


def bytes_requested(message: str) -> int | None:
    """Size of a failed allocation, from its message ("Tried to allocate 2.00 GiB", "allocate 123 bytes")."""
    match = re.search(rf"allocate ([\d.]+) ({'|'.join(_UNITS)})", message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None
