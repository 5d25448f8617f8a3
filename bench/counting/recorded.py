"""The counters that a cell's record keeps: exact ones, and how well the device was used."""

from __future__ import annotations

import numpy as np

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.counters import count
from tpme.bench.counting.meta import MetaCell
from tpme.bench.devices import measured_profile, mfu
from tpme.bench.job import Job
from tpme.bench.record import Reading
from tpme.bench.task.dataset import Dataset
from tpme.bench.train.loop import WARMUP_EPOCHS, Outcome


def recorded_counters(job: Job, dataset: Dataset, outcome: Outcome, *, finished: bool) -> dict[str, Reading]:
    """Counters of the cell of ``job``, by name; ``mfu`` only where training ``finished`` and timed its steps.

    The device is calibrated where it never was before: call it outside everything that is measured.
    """
    counts = count(MetaCell(job.cell, DataShape.of(dataset), methods_path=job.methods_path))
    readings = counts.readings()
    if finished and outcome.step_s:
        step_s, epoch = np.array(outcome.step_s), np.array(outcome.step_epoch)
        counted = epoch > WARMUP_EPOCHS if (epoch > WARMUP_EPOCHS).any() else epoch > 0
        readings["mfu"] = mfu(
            counts.step.forward_flops + counts.step.backward_flops,
            float(np.median(step_s[counted])),
            measured_profile(job.cell.device, job.store),
            job.cell.training.precision,
        )
    return readings
