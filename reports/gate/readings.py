"""What the gate reads of one record: times and peaks, of training and of inference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from tpme.bench.quantities import memory_instrument
from tpme.bench.record import CellResult, Reading, RecordError
from tpme.bench.side_files import load_samples
from tpme.reports.data.load import Recorded
from tpme.reports.data.stats import Floats


def step_times(recorded: Recorded) -> Floats:
    """Seconds of every training step after the warm-up epochs, shape ``(steps,)``.

    A run too short for warm-up epochs leaves out its first step instead, which includes one-time work.
    """
    path, warmup = recorded.beside("samples"), recorded.result.warmup_epochs
    if path is None:
        return np.empty(0)
    samples = load_samples(path)
    counted: Floats = np.asarray(samples.step_s, dtype=np.float64)
    if not (counted > 0).all():
        raise RecordError(f"{path}: its step times are not positive; run the cell again")
    return counted[samples.step_epoch > warmup] if warmup else counted[1:]


def epoch_times(recorded: Recorded) -> Floats:
    """Training seconds of every epoch after the warm-up epochs, shape ``(epochs,)``."""
    result = recorded.result
    return np.array([epoch.train_s for epoch in result.epochs if epoch.index > result.warmup_epochs], dtype=np.float64)


def inference_times(recorded: Recorded, name: str) -> Floats:
    """Seconds of a pass in every run of the field ``name`` of ``Inference``, shape ``(runs,)``."""
    facts = recorded.result.inference
    return np.array(getattr(facts, name).run_s if facts else (), dtype=np.float64)


TIMES: dict[str, Callable[[Recorded], Floats]] = {
    "step_s": step_times,
    "epoch_s": epoch_times,
    **{f"inference_{name}_s": partial(inference_times, name=name) for name in ("single", "batch", "user")},
}
"""The gated times of a record, by the field of ``Timing``."""


def memory(result: CellResult) -> dict[str, float]:
    """The gated peaks of training and of inference: torch's allocated bytes, or the resident bytes on a CPU."""
    windows = {"": result.pass_memory, "inference_": result.inference.memory if result.inference else None}
    gated: dict[str, float] = {}
    for window, peaks in windows.items():
        if peaks is not None:
            name = memory_instrument("measured_peak_bytes", peaks, result.cell.device)
            reading: Reading = getattr(peaks, name)
            gated |= {window + name: reading.value} if reading.valid and reading.value is not None else {}
    return gated
