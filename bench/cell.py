"""The story of one cell, top to bottom: load -> adapt -> train (validate, rank) -> export -> record.

Runs in a process of its own (``python -m tpme.bench.cell JOB``), started by the launcher, so that nothing an earlier
cell left behind in memory, caches or generators can touch what is measured here. However it ends, one record is
written with all that is known.
"""

from __future__ import annotations

import gc
import io
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from tpme.bench.errors import UserError
from tpme.bench.job import Job, progress_line
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
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import encoder_shape, image_size, load_encoder
from tpme.bench.task.evaluate import ITEMS_PER_CHUNK
from tpme.bench.task.features import FeatureJob, FeatureManifest, feature_folder, load, planned_bytes, read_manifest
from tpme.bench.task.ranking import NonFiniteScoreError
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.sequential import SequentialEncoder
from tpme.bench.task.tokens import tokenise
from tpme.bench.train.loop import WARMUP_EPOCHS, DivergedError, Outcome, Trainer
from tpme.methods.base import Method, Plan, TaskShape
from tpme.methods.registry import create

THROUGHPUT_CHUNKS = 4
"""Chunks of items that inference throughput is timed over, after one that is not."""
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
                _load_libraries(self.device)
            self.phases.baseline()
            self._tell()
        except (DivergedError, NonFiniteScoreError) as error:
            return self._failed("diverged", error)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return self._failed("oom", error)
        except UserError as error:
            return self._failed("error", error)
        except RuntimeError as error:
            # The CPU allocator raises a plain RuntimeError.
            return self._failed("oom" if "can't allocate memory" in str(error) else "error", error)
        except Exception as error:
            return self._failed("error", error)
        return "ok"

    def _tell(self) -> None:
        torch.manual_seed(self.cell.seed)
        method = create(self.cell.method, self.cell.options, self.job.methods_path)
        with self.phases.phase("load", "data"):
            self.progress("load", 0.0)
            dataset = self._open_dataset()
        model, store = self._load(method, dataset)
        with self.phases.phase("adapt"):
            plan = Plan(self.cell.training.epochs, self._steps(dataset), dataset.popularity)
            method.adapt(model, plan)
            if self.cell.training.activation_checkpointing:
                for view in model.views.values():
                    view.checkpoint_activations()
            model.to(self.device)
            self._flag_encoders(model, method)
            self.known.parameters = _parameters(model, method)
        trainer = Trainer(self.cell, model, method, dataset, store, self.phases, self.device, self.progress)
        self.known.trainer, self.known.outcome = trainer, trainer.outcome
        trainer.run()
        with self.phases.phase("export"):
            self._export(trainer)

    # --- its parts --------------------------------------------------------------------------------------------------

    def _open_dataset(self) -> Dataset:
        dataset = Dataset.open(self.job.dataset_path)
        manifest = dataset.manifest
        if manifest.fingerprint != self.cell.dataset_fingerprint:
            raise UserError(f"{self.job.dataset_path}: changed since the matrix was read; run the matrix again")
        self.known.dataset = DatasetFacts(
            name=self.cell.dataset,
            fingerprint=manifest.fingerprint,
            users=manifest.users,
            items=manifest.items,
            interactions=manifest.interactions,
            items_never_trained=dataset.items_never_trained,
            modalities=manifest.modalities,
        )
        return dataset

    def _specs(self, method: Method) -> dict[Modality, EncoderSpec]:
        used = self.cell.modalities if method.modalities is None else method.modalities
        specs: dict[Modality, EncoderSpec | None] = {"text": self.cell.text_encoder, "image": self.cell.image_encoder}
        return {modality: spec for modality in used if (spec := specs[modality]) is not None}

    def _load(self, method: Method, dataset: Dataset) -> tuple[Recommender, ItemStore]:
        """The model on the host, before the method adapts it, and where item inputs come from."""
        specs = self._specs(method)
        shapes = {modality: encoder_shape(spec) for modality, spec in specs.items()}
        item_encoder = method.item_encoder(TaskShape(self.cell.training.embedding_dim, dataset.manifest.items, shapes))
        training = self.cell.training
        if self.cell.cached:
            states = self._cache(specs, shapes, item_encoder.reads, dataset)
            store, views = ItemStore(dataset, states=states), {}
        else:
            with self.phases.phase("load", "encoders"):
                self.progress("load encoders", 0.0)
                store = self._item_store(dataset, specs)
                loaded = {m: load_encoder(spec, m, seed=self.cell.seed) for m, spec in specs.items()}
                self.known.encoders = {modality: encoder.facts for modality, encoder in loaded.items()}
                views = {modality: encoder.view for modality, encoder in loaded.items()}
        sequence = SequentialEncoder(
            training.embedding_dim, dataset.manifest.max_seq_len, training.blocks, training.heads, training.dropout
        )
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

    def _cache(self, specs, shapes, reads, dataset):  # type: ignore[no-untyped-def]
        """Cached hidden states, built first by a process of their own where they are not there yet."""
        job = FeatureJob(
            dataset=self.job.dataset_path,
            store=self.job.store,
            encoders=specs,
            levels={modality: reads[modality].levels for modality in specs},
            final={modality: reads[modality].final for modality in specs},
            title_tokens=self.cell.training.title_tokens,
            device=str(self.device),
            seed=self.cell.seed,
            limit_bytes=self.job.cache_limit_bytes,
        )
        folder = feature_folder(job, self.cell.dataset_fingerprint)
        there = read_manifest(folder)
        if there is None:
            with self.phases.phase("cache"):
                _build_cache(job, self.job, self.progress)
        with self.phases.phase("load", "cache"):
            states, placement = load(folder, self.device)
        manifest = read_manifest(folder)
        assert manifest is not None
        self.known.cache = _cache_facts(manifest, built=there is None)
        self.known.counters["cache_bytes"] = Reading(
            value=planned_bytes(dataset.manifest.items, shapes, reads), source="(N+1) x levels x width x 2 bytes"
        )
        self._flag("cache-placement", f"cached states are kept in {placement} memory")
        return states

    def _steps(self, dataset: Dataset) -> int:
        whole = -(-dataset.manifest.users // self.cell.training.users_per_batch)
        return min(whole, self.cell.training.max_steps_per_epoch or whole)

    def _export(self, trainer: Trainer) -> None:
        model, method = trainer.model, trainer.method
        self.known.parameters = _parameters(model, method)
        for name, value in method.report(model).items():
            self.known.counters[name] = Reading(value=value, source=f"report() of {self.cell.method}")
        method.prepare_inference(model)
        self.known.throughput = _throughput(trainer)

    def _flag_encoders(self, model: Recommender, method: Method) -> None:
        random = [m for m, spec in self._specs(method).items() if spec.weights == "random"]
        if random:
            self._flag("random-weights", f"{' and '.join(random)} encoder with random weights: quality means nothing")
        if self.cell.training.activation_checkpointing and (model.decoupled or not model.views):
            self._flag("no-checkpointing", "nothing to checkpoint: no gradient flows through an encoder")

    def _flag(self, code: str, message: str) -> None:
        self.known.flags.append(Flag(code=code, message=message))

    # --- its end ----------------------------------------------------------------------------------------------------

    def _failed(self, status: Status, error: BaseException) -> Status:
        if not isinstance(error, (UserError, DivergedError)):
            traceback.print_exception(error)
        state = self.known.trainer.state if self.known.trainer else None
        last = self.phases.phases[-1] if self.phases.phases else None
        # A traceback holds every tensor of the step alive.
        error.__traceback__ = None
        gc.collect()
        message = " ".join(str(error).split()) or type(error).__name__
        self.known.failure = Failure(
            phase=f"{last.kind} {last.name}".strip() if last else "start",
            message=message[:400]
            if isinstance(error, (UserError, ArithmeticError))
            else f"{type(error).__name__}: {message[:400]}",
            epoch=state.epoch if state else None,
            step=error.step if isinstance(error, DivergedError) else (state.step + 1 if state else None),
            bytes_requested=_bytes_requested(message) if status == "oom" else None,
        )
        return status

    def record(self, status: Status) -> CellResult:
        """Write ranks and samples, and return the record; call it after the instruments have stopped."""
        known, outcome = self.known, self.known.outcome
        warmup = WARMUP_EPOCHS if len(outcome.epochs) > 2 * WARMUP_EPOCHS else 0
        files = {"samples": _save(self.job.file(".samples.npz"), self._samples(outcome))}
        if outcome.test_ranks is not None and status == "ok":
            files["ranks"] = _save(self.job.file(".ranks.npz"), self._ranks(outcome))
        return CellResult(
            cell_id=self.job.cell_id,
            attempt=self.job.attempt,
            cell=self.cell,
            code_version=self.job.code_version,
            status=status,
            failure=known.failure,
            started_at=self.started_at.isoformat(timespec="seconds"),
            wall_s=sum(phase.wall_s for phase in self.phases.phases),
            environment=environment(self.device),
            dataset=known.dataset,
            text_encoder=known.encoders.get("text"),
            image_encoder=known.encoders.get("image"),
            parameters=known.parameters,
            phases=tuple(self.phases.phases),
            epochs=tuple(outcome.epochs),
            warmup_epochs=warmup,
            best_epoch=outcome.best_epoch,
            epoch_time_s=_epoch_time(outcome, warmup),
            training_memory=self.phases.training_memory() if outcome.epochs else None,
            cache=known.cache,
            inference_items_per_s=known.throughput,
            counters=known.counters | self.phases.counters(),
            flags=(*known.flags, *self.phases.flags()),
            files=files,
        )

    def _ranks(self, outcome: Outcome) -> dict[str, np.ndarray]:
        assert self.known.trainer is not None
        dataset = self.known.trainer.dataset
        test = dataset.test
        return {
            "rank": outcome.test_ranks,
            "target": test.target,
            "cold": dataset.popularity[test.target] == 0,
            "in_history": (test.history == test.target[:, None]).any(axis=1),
        }

    def _samples(self, outcome: Outcome) -> dict[str, np.ndarray]:
        samples = self.phases.samples
        assert samples is not None
        return {
            "step_s": np.array(outcome.step_s),
            "step_epoch": np.array(outcome.step_epoch, dtype=np.int32),
            "sample_t_s": samples.t_s,
            "sample_bytes": samples.device_bytes if self.device.type == "cuda" else samples.host_bytes,
        }


def _load_libraries(device: torch.device) -> None:
    """One step of a toy model: torch imports and sets up much on first use, which is no method's memory or time."""
    layer = torch.nn.Linear(8, 8, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    query = layer(torch.ones(1, 2, 4, 8, device=device))
    torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    optimizer.step()


def _build_cache(job: FeatureJob, cell_job: Job, progress: Progress) -> None:
    path = cell_job.file(".cache-job.json")
    write_atomically(path, job.model_dump_json().encode())
    command = [sys.executable, "-m", "tpme.bench.task.features", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            progress("build the feature cache", float(line))
        told = process.stderr.read().strip()
    path.unlink(missing_ok=True)
    if process.returncode:
        last = told.splitlines()[-1].removeprefix("tpme: ") if told else f"exit code {process.returncode}"
        raise UserError(f"building the feature cache failed: {last}")


def _cache_facts(manifest: FeatureManifest, *, built: bool) -> CacheFacts:
    return CacheFacts(
        build_s=manifest.build_s,
        bytes=manifest.bytes,
        items=manifest.items,
        dtype=manifest.dtype,
        built_by_attempt=built,
    )


def _parameters(model: Recommender, method: Method) -> Parameters:
    groups = {name: sum(p.numel() for p in parameters) for name, parameters in model.parameter_groups().items()}
    state = method.state(model)
    return Parameters(
        trainable=sum(groups.values()),
        trainable_max=sum(groups.values()),
        total=sum(p.numel() for p in model.parameters()),
        by_group=groups,
        stored_bytes=sum(value.numel() * value.element_size() for value in state.values()),
    )


@torch.no_grad()
def _throughput(trainer: Trainer) -> Reading:
    """Items encoded a second with the adapted model, ready for inference, data loading excluded."""
    n = trainer.dataset.manifest.items
    ids = np.arange(1, 1 + min(n, ITEMS_PER_CHUNK), dtype=np.int64)
    items = trainer.store.gather(ids).to(trainer.device)
    trainer.model.eval()
    trainer.model.encode_items(items)
    times = []
    for _ in range(THROUGHPUT_CHUNKS):
        start = _now(trainer.device)
        trainer.model.encode_items(items)
        times.append(_now(trainer.device) - start)
    return Reading(
        value=len(ids) / float(np.median(times)), source=f"median of {THROUGHPUT_CHUNKS} chunks of {len(ids)} items"
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _epoch_time(outcome: Outcome, warmup: int) -> Reading:
    source = f"median training time of the epochs after {warmup} warm-up epoch(s)"
    if not outcome.epochs:
        return Reading.missing(source, "no epoch was finished: nothing trains, or the cell failed before")
    return Reading(value=float(np.median([epoch.train_s for epoch in outcome.epochs[warmup:]])), source=source)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return path.name


def _bytes_requested(message: str) -> int | None:
    """What a failed allocation asked for, from torch's message ("Tried to allocate 2.00 GiB", "allocate 123 bytes")."""
    found = re.search(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB)", message)
    if not found:
        return None
    return int(float(found[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]])


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
    with _own_stdout() as events:
        last = 0.0

        def progress(what: str, share: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.2 or share >= 1:
                last = now
                events.write(progress_line(what, share) + "\n")

        with measuring(job.cell.device) as phases:
            story = Story(job, phases, progress)
            status = story.tell()
        write_result(story.record(status), job.file(".json"))


if __name__ == "__main__":
    main()
