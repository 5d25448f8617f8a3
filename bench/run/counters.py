"""The counters in a cell's record: exact ones, the noise floor, and the utilisation of the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.devices import DeviceNoise, known_profile, measured_profile, mfu, profile_key, workspace_bytes
from tpme.bench.counting.exact import count, planned_peak, run_step
from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import one_line
from tpme.bench.measure.environment import environment
from tpme.bench.record import Reading
from tpme.bench.run.job import Job
from tpme.bench.train.ending import TimeLimitReached
from tpme.bench.train.loop import Trainer
from tpme.bench.train.outcome import WARMUP_EPOCHS, Outcome


def trained_structure(trainer: Trainer) -> MetaCell | Exception:
    """The structure as trained, for the exact counters; or the error that prevents these counters, and nothing else."""
    try:
        return MetaCell.trained(trainer, DataShape.of(trainer.dataset))
    except Exception as error:
        return error


def final_counters(job: Job, trainer: Trainer, structure: MetaCell | Exception, *, trained: bool) -> dict[str, Reading]:
    """All counters that need no measurement of the cell; a failure becomes the reason of the first that is missing.

    ``structure``: as trained. ``trained``: training ended well, so its step times give the utilisation of the device.
    """
    counters: dict[str, Reading] = {}
    try:
        with trainer.phases.phase("count", "counters"):
            trainer.progress("count", 0.0)
            counters |= noise_floor(job)
            if isinstance(structure, Exception):
                raise structure
            counters |= exact_counters(structure)
            if trained:
                counters |= utilisation(job, trainer.outcome, counters)
    except (Exception, TimeLimitReached) as error:
        failed = "mfu" if "forward_flops" in counters else "forward_flops"
        counters[failed] = Reading.missing("counted on meta", one_line(error))
    return counters


def exact_counters(meta: MetaCell) -> dict[str, Reading]:
    """The exact counters of a cell, by name, and the peak of memory that ``tpme plan`` prints."""
    counts, step = count(meta), run_step(meta, fused_attention=True)
    device = meta.cell.device
    memory_bytes = torch.cuda.mem_get_info()[1] if device == "cuda" else None
    peak = Reading(
        value=planned_peak(counts, step, memory_bytes, workspace_bytes(device)),
        source="memory peak of a step simulated as on a GPU, optimiser and cache included",
    )
    return counts.readings() | {"planned_peak_bytes": peak}


def noise_floor(job: Job) -> dict[str, Reading]:
    """Spread between runs of one cell on the device of ``job``, and the cost of the harness, where measured."""
    alone = job.cell.training.devices == 1
    profile = known_profile(profile_key(environment(job.cell.device)), job.store) if alone else None
    noise = profile.noise if profile else None
    if noise is None:
        reason = "not measured on this device yet; 'tpme doctor --noise' does"
        reason = reason if alone else "'tpme doctor --noise' measures one device, not several together"
        return dict.fromkeys(DeviceNoise.RATIOS, Reading.missing("A/A runs", reason))
    return {name: Reading(value=getattr(noise, name), source=noise.source) for name in DeviceNoise.RATIOS}


def utilisation(job: Job, outcome: Outcome, counters: Mapping[str, Reading]) -> dict[str, Reading]:
    """``mfu`` of the training with this ``outcome``; nothing where no step was timed.

    Not valid where operators are missing from the FLOPs. Calibrates a device the first time: call it outside
    everything that is measured.
    """
    if not outcome.step_s:
        return {}
    step_s, epoch = np.array(outcome.step_s), np.array(outcome.step_epoch)
    warm = epoch > outcome.earlier_epochs + WARMUP_EPOCHS
    typical_s = float(np.median(step_s[warm] if warm.any() else step_s))
    parts = [counters[name] for name in ("forward_flops", "backward_flops")]
    lacking = next((part.reason for part in parts if part.reason), None)
    flops = sum(part.value or 0.0 for part in parts) / job.cell.training.devices  # counted for the whole batch
    profile = measured_profile(job.cell.device, job.store)
    reading = mfu(flops, typical_s, profile, job.cell.training.precision)
    return {"mfu": reading.model_copy(update={"valid": lacking is None, "reason": lacking})}
