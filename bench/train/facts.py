"""What a record says of a cell, and how it follows from its model, its outcome and its samples."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tpme.bench.measure.sampler import SampledCurve
from tpme.bench.record import (
    CacheFacts,
    Cell,
    DatasetFacts,
    EncoderFacts,
    EncoderSpec,
    Failure,
    Flag,
    Inference,
    Modality,
    Parameters,
    Phase,
    PhaseKind,
    Reading,
    Representation,
    Status,
)
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.loop import Trainer
from tpme.bench.train.outcome import Outcome
from tpme.bench.writing import write_atomically
from tpme.methods.base import Method

Arrays = dict[str, NDArray[Any]]


@dataclass
class CellFacts:
    """What is known of the cell so far; its record is built from it whenever the cell ends."""

    dataset: DatasetFacts | None = None
    encoders: dict[Modality, EncoderFacts] = field(default_factory=dict)
    parameters: Parameters | None = None
    cache: CacheFacts | None = None
    inference: Inference | None = None
    representation: Representation | None = None
    counters: dict[str, Reading] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    failure: Failure | None = None
    trainer: Trainer | None = None
    setup: str | None = None
    """What is done once, during the first training steps."""

    def flag(self, code: str, message: str) -> None:
        """Flag the cell in its record."""
        self.flags.append(Flag(code=code, message=message))

    def flag_evaluation(self, cell: Cell, data: DatasetFacts) -> None:
        """Flag a sample of users, and one that was asked for and is all users."""
        asked, seed = cell.evaluation.users, cell.evaluation.seed
        if data.evaluated_users is not None:
            of = f"{data.evaluated_users:,} of {data.users:,} users, drawn at random with seed {seed}"
            self.flag("sampled-users", f"validation and test rank the targets of {of}")
        elif asked is not None:
            self.flag("all-users", f"evaluation.users is {asked:,}, the data has {data.users:,}: all were evaluated")

    def flag_encoders(self, cell: Cell, specs: Mapping[Modality, EncoderSpec], model: Recommender) -> None:
        """Flag encoders with random weights, and checkpointing without effect."""
        random = [modality for modality, spec in specs.items() if spec.weights == "random"]
        if random:
            self.flag("random-weights", f"{' and '.join(random)} encoder with random weights: quality is meaningless")
        if cell.training.activation_checkpointing and model.frozen.issuperset(model.views):
            self.flag("no-checkpointing", "nothing to checkpoint: no gradient flows through an encoder")


def ranks(dataset: Dataset, rank: NDArray[np.int32]) -> Arrays:
    """The arrays of a record's ``ranks`` file, one entry per user; ``rank`` holds those of the test targets."""
    test = dataset.test
    users = {} if dataset.evaluated is None else {"user": dataset.evaluated}
    return users | {
        "rank": rank,
        "target": test.target,
        "cold": dataset.popularity[test.target] == 0,
        "in_history": (test.history == test.target[:, None]).any(axis=1),
    }


def samples(outcome: Outcome, curve: SampledCurve | None, device: torch.device) -> Arrays:
    """The arrays of a record's ``samples`` file: step times, and the memory curve of the device's own memory."""
    assert curve is not None
    return {
        "step_s": np.array(outcome.step_s),
        "step_epoch": np.array(outcome.step_epoch, dtype=np.int32),
        "sample_t_s": curve.t_s,
        "sample_bytes": curve.device_bytes if device.type == "cuda" else curve.host_bytes,
    }


def save_arrays(path: Path, arrays: Arrays) -> str:
    """Write ``arrays`` to a compressed file; returns its name."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())
    return path.name


def parameter_counts(model: Recommender, method: Method, trainable_max: int = 0) -> Parameters:
    """Exact counts; ``trainable_max`` is the largest number of parameters that trained at one time so far."""
    groups = {name: sum(p.numel() for p in parameters) for name, parameters in model.parameter_groups().items()}
    state = method.state(model)
    return Parameters(
        trainable=sum(groups.values()),
        trainable_max=max(trainable_max, sum(groups.values())),
        total=sum(p.numel() for p in model.parameters()),
        by_group=groups,
        stored_bytes=sum(value.numel() * value.element_size() for value in state.values()),
    )


def method_counters(method: Method, model: Recommender, name: str) -> dict[str, Reading]:
    """The counters that the method ``name`` reports; one that is not finite is missing, because JSON cannot hold it."""
    source = f"report() of {name}"
    return {
        key: Reading(value=value, source=source) if math.isfinite(value) else Reading.missing(source, f"it is {value}")
        for key, value in ((key, float(value)) for key, value in method.report(model).items())
    }


def epoch_time(outcome: Outcome) -> Reading:
    """T of TPME in seconds: the median training time of the last stage's epochs after its warm-up."""
    earlier, leading = outcome.earlier_epochs, outcome.warmup_epochs
    stage = f"stage '{outcome.epochs[-1].stage}'" if earlier else "the epochs"
    source = f"median training time of {stage} after {leading - earlier} warm-up epoch(s)"
    if not outcome.epochs:
        return Reading.missing(source, "no epoch was finished: nothing trains but in rounds, or the cell failed before")
    return Reading(value=float(np.median([epoch.train_s for epoch in outcome.epochs[leading:]])), source=source)


ALL_IN: tuple[PhaseKind, ...] = ("estimate", "search", "round", "train")
"""Kinds of phases in which a method works towards its final model."""


def all_in(phases: Sequence[Phase], cache: CacheFacts | None, resumed_s: float, status: Status) -> Reading:
    """Seconds from an unadapted model to the trained one: feature cache, estimation, search, rounds, all stages.

    resumed_s: what earlier attempts spent on parts that this one took over.
    """
    source = "feature cache, estimation, search, rounds and training epochs of all stages" + (
        f"; {resumed_s:.3g} s of it in earlier attempts" if resumed_s else ""
    )
    if status != "ok":
        return Reading.missing(source, f"the cell ended as '{status}'")
    spent_s = [phase.wall_s for phase in phases if phase.kind in ALL_IN]
    if not spent_s and not resumed_s:
        return Reading.missing(source, "nothing trains")
    return Reading(value=sum(spent_s) + resumed_s + (cache.build_s if cache else 0.0), source=source)
