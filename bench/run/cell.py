"""The story of one cell, top to bottom: load -> adapt -> train (validate, rank) -> export -> record.

Runs in a process of its own (``python -m tpme.bench.run.cell JOB``), started by the launcher, so that nothing an
earlier cell left behind in memory, caches or generators can touch what is measured here. However it ends, one record
is written with all that is known.
"""

from __future__ import annotations

import gc
import io
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from tpme.bench.errors import UserError
from tpme.bench.measure.environment import environment
from tpme.bench.measure.phases import PhaseLog, measuring
from tpme.bench.record import (
    CacheFacts,
    CellResult,
    DatasetFacts,
    EncoderFacts,
    EncoderSpec,
    Failure,
    Flag,
    Modality,
    Parameters,
    Reading,
    Status,
    write_atomically,
    write_result,
)
from tpme.bench.run.counters import exact_counters, noise_floor, utilisation
from tpme.bench.run.job import Job, pinned, progress_line, time_limit_message
from tpme.bench.task.batches import ItemStore, States
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import encoder_shape, image_size, load_encoder
from tpme.bench.task.features import PLACES, FeatureJob, planned_bytes
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.sequential import SequentialEncoder
from tpme.bench.task.tokens import tokenise
from tpme.bench.train.cached import cached_states
from tpme.bench.train.compiling import compile_model
from tpme.bench.train.ending import TimeLimitReached, failure_of, status_of
from tpme.bench.train.facts import Arrays, epoch_time, parameter_counts, ranks, reported, samples, throughput
from tpme.bench.train.graphs import GraphedLoss, why_not
from tpme.bench.train.loop import WARMUP_EPOCHS, Outcome, Trainer
from tpme.bench.train.split import PARTS, step_split
from tpme.methods.base import Method, Schedule, TaskShape
from tpme.methods.registry import create

Progress = Callable[[str, float], None]


@dataclass
class Known:
    """What is known of the cell so far; the record is made of it whenever the cell ends."""

    dataset: DatasetFacts | None = None
    encoders: dict[Modality, EncoderFacts] = field(default_factory=dict)
    parameters: Parameters | None = None
    cache: CacheFacts | None = None
    outcome: Outcome = field(default_factory=Outcome)
    throughput: Reading | None = None
    counters: dict[str, Reading] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    failure: Failure | None = None
    trainer: Trainer | None = None
    setup: str | None = None
    """What happens in the first training steps alone."""


class Story:
    """One attempt at one cell. ``tell`` runs it; ``record`` says what came of it."""

    def __init__(self, job: Job, phases: PhaseLog, progress: Progress) -> None:
        self.job, self.cell, self.phases, self.progress = job, job.cell, phases, progress
        self.device = torch.device(job.cell.device)
        self.started_at = datetime.now(UTC)
        self.known = Known()

    def tell(self) -> Status:
        """Run the cell; every way it can end is a status."""
        try:
            with self.phases.phase("load", "libraries"):
                load_libraries(self.device)
                # A million objects of libraries: no collection shall walk them again, between phases or in a step.
                gc.freeze()
            self.phases.baseline()
            self._tell()
        except (Exception, TimeLimitReached) as error:
            status = self._failed(error)
        else:
            status = "ok"
        self._count(status)
        return status

    def _tell(self) -> None:
        trainer = self.prepare()
        trainer.run()
        with self.phases.phase("export", "counts"):
            self._export_counts(trainer)
        self._split(trainer)
        with self.phases.phase("export"):
            trainer.method.prepare_inference(trainer.model)
            self.known.throughput = throughput(trainer)

    def prepare(self) -> Trainer:
        """Load data and encoders and let the method adapt them; returns what trains the cell."""
        _seed(self.cell.seed)
        method = create(self.cell.method, self.cell.options, self.job.methods_path)
        with self.phases.phase("load", "data"):
            self.progress("load", 0.0)
            dataset = self._open_dataset()
        model, store = self._load(method, dataset)
        with self.phases.phase("adapt"):
            # Again, here and before training: what loading draws must not set cached and uncached rows apart.
            _seed(self.cell.seed)
            schedule = Schedule(self.cell.training.epochs, self._steps(dataset), dataset.popularity)
            method.adapt(model, schedule)
            if self.cell.training.activation_checkpointing:
                for view in model.views.values():
                    view.checkpoint_activations()
            model.to(self.device)
            if self.cell.training.compile:
                self._compile(model)
            self._flag_encoders(model, method)
            self.known.parameters = parameter_counts(model, method)
        trainer = Trainer(self.cell, model, method, dataset, store, self.phases, self.device, self.progress)
        if self.cell.training.cuda_graphs:
            self._record_graphs(trainer)
        self.known.trainer, self.known.outcome = trainer, trainer.outcome
        _seed(self.cell.seed)
        return trainer

    # --- its parts --------------------------------------------------------------------------------------------------

    def _open_dataset(self) -> Dataset:
        dataset = Dataset.open(self.job.dataset_path)
        if dataset.manifest.fingerprint != self.cell.dataset_fingerprint:
            raise UserError(f"{self.job.dataset_path}: changed since the matrix was read; run the matrix again")
        self.known.dataset = dataset.facts(self.cell.dataset)
        return dataset

    def _specs(self, method: Method) -> dict[Modality, EncoderSpec]:
        used = self.cell.modalities if method.modalities is None else method.modalities
        specs: dict[Modality, EncoderSpec | None] = {"text": self.cell.text_encoder, "image": self.cell.image_encoder}
        return {modality: spec for modality in used if (spec := specs[modality]) is not None}

    def _load(self, method: Method, dataset: Dataset) -> tuple[Recommender, ItemStore]:
        """The model on the host, before the method adapts it, and where item inputs come from."""
        specs = self._specs(method)
        for spec in specs.values():
            if spec.revision is not None and pinned(spec) != spec:
                raise UserError(f"encoder '{spec.source}': changed since the matrix was read; run the matrix again")
        shapes = {modality: encoder_shape(spec) for modality, spec in specs.items()}
        item_encoder = method.item_encoder(TaskShape(self.cell.training.embedding_dim, dataset.manifest.items, shapes))
        training = self.cell.training
        sequence = SequentialEncoder(
            training.embedding_dim, dataset.manifest.max_seq_len, training.blocks, training.heads, training.dropout
        )
        if self.cell.cached:
            states = self._cached(specs, shapes, item_encoder.reads, dataset)
            store, views = ItemStore(dataset, states=states, pin=self.device.type == "cuda"), {}
        else:
            with self.phases.phase("load", "encoders"):
                self.progress("load encoders", 0.0)
                store = self._item_store(dataset, specs)
                loaded = {m: load_encoder(spec, m, seed=self.cell.seed) for m, spec in specs.items()}
                self.known.encoders = {modality: encoder.facts for modality, encoder in loaded.items()}
                views = {modality: encoder.view for modality, encoder in loaded.items()}
        return Recommender(views, item_encoder, sequence, decoupled=method.decoupled), store

    def _item_store(self, dataset: Dataset, specs: dict[Modality, EncoderSpec]) -> ItemStore:
        text, image = specs.get("text"), specs.get("image")
        if image is not None and image_size(image) != dataset.manifest.image_size:
            raise UserError(
                f"{self.job.dataset_path}: images are {dataset.manifest.image_size} pixels wide, the encoder "
                f"'{image.source}' reads {image_size(image)}; prepare the data with --image-size {image_size(image)}"
            )
        tokens = None
        if text is not None:
            tokens = tokenise(dataset, text.source, text.revision, self.cell.training.title_tokens, self.job.store)
        return ItemStore(dataset, tokens=tokens, images=image is not None)

    def _cached(
        self,
        specs: Mapping[Modality, EncoderSpec],
        shapes: Mapping[Modality, EncoderShape],
        reads: Mapping[Modality, Reads],
        dataset: Dataset,
    ) -> States:
        """Cached hidden states, built first by a process of their own where they are not there yet."""
        job = FeatureJob(
            dataset=self.job.dataset_path,
            store=self.job.store,
            encoders=dict(specs),
            levels={modality: reads[modality].levels for modality in specs},
            final={modality: reads[modality].final for modality in specs},
            title_tokens=self.cell.training.title_tokens,
            device=str(self.device),
            seed=self.cell.seed,
            limit_bytes=self.job.cache_limit_bytes,
        )
        found = cached_states(job, self.cell.dataset_fingerprint, self.phases, self.progress)
        self.known.cache = found.facts
        self.known.counters["cache_bytes"] = Reading(
            value=planned_bytes(dataset.manifest.items, shapes, reads), source="(N+1) x levels x width x 2 bytes"
        )
        self._flag("cache-placement", f"cached states are kept in {PLACES[found.placement]}")
        return found.states

    def _steps(self, dataset: Dataset) -> int:
        whole = -(-dataset.manifest.users // self.cell.training.users_per_batch)
        return min(whole, self.cell.training.max_steps_per_epoch or whole)

    def _export_counts(self, trainer: Trainer) -> None:
        model, method = trainer.model, trainer.method
        self.known.parameters = parameter_counts(model, method, trainer.outcome.trainable_max)
        for name, value in method.report(model).items():
            self.known.counters[name] = reported(float(value), f"report() of {self.cell.method}")

    def _split(self, trainer: Trainer) -> None:
        """The parts of a step. All results are in: whatever goes wrong here costs these readings alone."""
        try:
            with self.phases.phase("estimate", "parts of a step"):
                self.progress("parts of a step", 0.0)
                self.known.counters |= step_split(trainer)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.known.counters |= dict.fromkeys(PARTS, Reading.missing("steps after training", reason))

    def _compile(self, model: Recommender) -> None:
        if model.parameter_groups():
            compile_model(model)
            self.known.setup = "compiling"
        else:
            self._flag("not-compiled", "nothing trains: nothing to compile")

    def _record_graphs(self, trainer: Trainer) -> None:
        if self.device.type != "cuda":
            raise UserError("cuda_graphs = true needs a CUDA device; turn it off or run with --device cuda")
        reason = why_not(trainer.method, trainer.model)
        if reason is None:
            users = self.cell.training.users_per_batch
            trainer.loss_of = GraphedLoss(trainer.method, trainer.model, users)
            self.known.setup = "recording CUDA graphs"
        else:
            self._flag("no-cuda-graphs", f"steps are not recorded as CUDA graphs: {reason}")

    def _flag_encoders(self, model: Recommender, method: Method) -> None:
        random = [m for m, spec in self._specs(method).items() if spec.weights == "random"]
        if random:
            self._flag("random-weights", f"{' and '.join(random)} encoder with random weights: quality means nothing")
        if self.cell.training.activation_checkpointing and (model.decoupled or not model.views):
            self._flag("no-checkpointing", "nothing to checkpoint: no gradient flows through an encoder")

    def _flag(self, code: str, message: str) -> None:
        self.known.flags.append(Flag(code=code, message=message))

    # --- its end ----------------------------------------------------------------------------------------------------

    def _failed(self, error: BaseException) -> Status:
        if not isinstance(error, (UserError, TimeLimitReached)):
            traceback.print_exception(error)
        # A traceback holds every tensor of the step alive.
        error.__traceback__ = None
        gc.collect()
        last = self.phases.phases[-1] if self.phases.phases else None
        phase = f"{last.kind} {last.name}".strip() if last else "start"
        self.known.failure = failure_of(error, phase, self.known.trainer)
        return status_of(error)

    def _count(self, status: Status) -> None:
        """Exact counters, after everything that is measured and also where training ended badly."""
        known, trainer = self.known, self.known.trainer
        if trainer is None or status == "timeout":
            return
        try:
            with self.phases.phase("estimate", "counters"):
                self.progress("count", 0.0)
                known.counters |= noise_floor(self.job)
                known.counters |= exact_counters(self.job, trainer.dataset)
                if status == "ok":
                    known.counters |= utilisation(self.job, trainer.outcome, known.counters)
        except (Exception, TimeLimitReached) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            lacking = "mfu" if "forward_flops" in known.counters else "forward_flops"
            known.counters[lacking] = Reading.missing("counted on meta", reason)

    def record(self, status: Status) -> CellResult:
        """Write ranks and samples, and return the record; call it after the instruments have stopped."""
        known, outcome = self.known, self.known.outcome
        last = self.phases.phases[-1] if self.phases.phases else None
        warmup = WARMUP_EPOCHS if len(outcome.epochs) > 2 * WARMUP_EPOCHS else 0
        if known.setup and outcome.epochs and not warmup:
            self._flag(
                "setup-in-time", f"{known.setup} is part of the epoch time: below three epochs none is a warm-up"
            )
        files = {"samples": _save(self.job.file(".samples.npz"), samples(outcome, self.phases.samples, self.device))}
        if known.trainer is not None and outcome.test_ranks is not None and status == "ok":
            files["ranks"] = _save(self.job.file(".ranks.npz"), ranks(known.trainer.dataset, outcome.test_ranks))
        return CellResult(
            cell_id=self.job.cell_id,
            attempt=self.job.attempt,
            cell=self.cell,
            code_version=self.job.code_version,
            status=status,
            failure=known.failure,
            started_at=self.started_at.isoformat(timespec="seconds"),
            wall_s=last.start_s + last.wall_s if last else 0.0,
            time_limit_s=self.job.time_limit_s,
            environment=environment(self.device),
            dataset=known.dataset,
            text_encoder=known.encoders.get("text"),
            image_encoder=known.encoders.get("image"),
            parameters=known.parameters,
            phases=tuple(self.phases.phases),
            epochs=tuple(outcome.epochs),
            warmup_epochs=warmup,
            best_epoch=outcome.best_epoch,
            epoch_time_s=epoch_time(outcome, warmup),
            training_memory=self.phases.training_memory() if outcome.epochs else None,
            cache=known.cache,
            inference_items_per_s=known.throughput,
            counters=known.counters | self.phases.counters(),
            flags=(*known.flags, *self.phases.flags()),
            files=files,
        )


def load_libraries(device: torch.device) -> None:
    """One step of a toy model: torch imports and sets up much on first use, which is no method's memory or time."""
    layer = torch.nn.Linear(8, 8, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    query = layer(torch.ones(1, 2, 4, 8, device=device))
    mixed = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    mixed.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _seed(seed: int) -> None:
    """Seed every generator that a method may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _save(path: Path, arrays: Arrays) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())
    return path.name


@contextmanager
def _own_stdout() -> Iterator[io.TextIOWrapper]:
    """The standard output for progress alone: whatever libraries print goes to standard error, the cell's log."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with events:
        yield events


def main() -> None:
    """Run the job whose file is the first argument; the exit code is 0 whenever a record was written."""
    job = Job.model_validate_json(Path(sys.argv[1]).read_bytes())

    def time_is_up(_number: int, _frame: object) -> NoReturn:
        raise TimeLimitReached(time_limit_message(job.time_limit_s))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the launcher ignores it
    with _own_stdout() as events:
        last = 0.0

        def progress(what: str, share: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.2 or share >= 1:
                last = now
                try:
                    events.write(progress_line(what, share) + "\n")
                except BrokenPipeError:
                    os._exit(1)  # the launcher is gone: nobody waits for this cell

        with measuring(job.cell.device) as phases:
            story = Story(job, phases, progress)
            signal.signal(signal.SIGTERM, time_is_up)
            status = story.tell()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the record comes next
        write_result(story.record(status), job.file(".json"))


if __name__ == "__main__":
    main()
