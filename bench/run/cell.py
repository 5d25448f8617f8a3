"""One cell from top to bottom: load -> adapt -> train (validate, rank) -> export -> record.

Each cell runs in a separate process (``python -m tpme.bench.run.cell JOB``), started by the launcher, so that nothing
an earlier cell left in memory, caches or generators affects what is measured. However it ends, it writes a record of
all that is known.
"""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from tpme.bench.lifetimes import die_with_launcher

if __name__ == "__main__":
    die_with_launcher()  # at once: torch takes seconds to load

import torch
from torch import Tensor

from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import UserError, one_line
from tpme.bench.measure.environment import environment
from tpme.bench.measure.phases import PhaseLog, measuring
from tpme.bench.record import REBUILT, CellResult, EncoderSpec, Environment, Modality, Reading, Status, write_result
from tpme.bench.run.cell_ranks import join, own_device, record_of_all, show_where_it_hangs
from tpme.bench.run.counters import final_counters, trained_structure
from tpme.bench.run.events import progress_events, telling
from tpme.bench.run.inference import measure_inference
from tpme.bench.run.inputs import check_encoders, feature_job, item_store, open_dataset
from tpme.bench.run.job import Job, time_limit_message
from tpme.bench.run.representation import measure_representation
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import encoder_shape, load_encoder
from tpme.bench.task.fingerprint import sha256_of
from tpme.bench.task.placement import PLACES, ItemShard, Table
from tpme.bench.task.precomputed import StatesFile
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.agreement import check_equal
from tpme.bench.train.build import (
    DataSize,
    EncoderUse,
    ModelBuilder,
    encoder_specs,
    seed_generators,
    starts_from_weights,
)
from tpme.bench.train.cached import Progress, stored_states
from tpme.bench.train.compiling import compile_model
from tpme.bench.train.delta import DeltaFile
from tpme.bench.train.ending import TimeLimitReached, failure_of, status_of
from tpme.bench.train.facts import (
    CellFacts,
    all_in,
    epoch_time,
    method_counters,
    parameter_counts,
    ranks,
    samples,
    save_arrays,
)
from tpme.bench.train.graphs import replay_graphs
from tpme.bench.train.kept import Kept
from tpme.bench.train.libraries import load_libraries
from tpme.bench.train.loop import Trainer
from tpme.bench.train.outcome import Outcome
from tpme.bench.train.ranks import Ranks
from tpme.bench.train.sharding import shard, unshard
from tpme.bench.train.split import guarded_split
from tpme.methods.base import Method
from tpme.methods.registry import create


class CellRun:
    """One attempt at one cell: ``run`` executes it, ``record`` returns its result.

    Where several ``ranks`` train it, each runs all of it; rank 0 alone writes files and measures what needs no other.
    """

    def __init__(
        self,
        job: Job,
        phases: PhaseLog,
        progress: Progress,
        ranks: Ranks | None = None,
        environments: Sequence[Environment] = (),
    ) -> None:
        self.job, self.cell, self.phases, self.progress = job, job.cell, phases, progress
        self.ranks = ranks or Ranks.alone(torch.device(job.cell.device))
        self.device, self.environments = self.ranks.device, environments
        self.started_at = datetime.now(UTC)
        self.facts = CellFacts()
        self.initial: dict[str, Tensor] = {}
        """What the item encoder takes from the weights of cached encoders."""
        self.kept = Kept(job.procedure)
        self._deltas = itertools.count()
        self.structure: MetaCell | Exception | None = None
        """What was trained, before it is prepared for inference."""

    def run(self) -> Status:
        """Run the cell; every way it can end is a status."""
        try:
            with self.phases.phase("load", "libraries"):
                load_libraries(self.device)
                gc.freeze()  # a million library objects: later collections, also those within a step, skip them
            self.phases.baseline()
            self._train_and_export()
        except (Exception, SystemExit, TimeLimitReached) as error:  # a method may end the program
            status = self._failed(error)
        else:
            status = "ok"
        if self.ranks.rank > 0:
            return status
        if self.job.probe_items is not None and status == "ok":
            self._measure_representation(self.job.probe_items)
        if self.facts.trainer is not None and status != "timeout":
            # After everything that is measured, and also where training ended badly.
            structure = self.structure or trained_structure(self.facts.trainer)
            self.facts.counters |= final_counters(self.job, self.facts.trainer, structure, trained=status == "ok")
        return status

    def _train_and_export(self) -> None:
        trainer = self.prepare()
        driver = trainer.method
        trainer.run()
        # A search or federation may have ended with the model of another method, or of other options.
        facts, method, model = self.facts, trainer.method, trainer.model
        if self.cell.training.shard:
            facts.counters |= guarded_split(trainer)
            with self.phases.phase("export", "gather weights"):
                unshard(model)
        with self.phases.phase("export", "counts"):
            facts.parameters = parameter_counts(model, method, trainer.outcome.trainable_max)
            for reporting in dict.fromkeys((method, driver)):
                facts.counters |= method_counters(reporting, model, self.cell.method)
            if self.ranks.rank == 0:
                self.structure = trained_structure(trainer)
        if not self.cell.training.shard:
            facts.counters |= guarded_split(trainer)
        with self.phases.phase("export"):
            method.prepare_inference(model)
        if self.ranks.rank == 0:
            self._measure_inference(trainer)

    def _measure_inference(self, trainer: Trainer) -> None:
        try:
            if self.cell.training.shard:  # its weights were gathered on the host
                trainer.model.to(self.device)
            self.facts.inference = measure_inference(trainer)
        except Exception as error:  # of memory, say; what was trained is a result all the same
            self.facts.flag("no-inference", f"inference was not measured: {one_line(error)}")

    def _measure_representation(self, probe_items: int) -> None:
        assert self.facts.trainer is not None
        try:
            self.facts.representation = measure_representation(self.job, self.facts.trainer, probe_items)
        except (Exception, TimeLimitReached) as error:  # as above
            self.facts.flag("no-representation", f"the representation space was not measured: {one_line(error)}")

    def prepare(self) -> Trainer:
        """Load data and encoders and let the method adapt them; returns what trains the cell."""
        cell, facts = self.cell, self.facts
        seed_generators(cell.seed)
        method = create(cell.method, cell.options, self.job.methods_path)
        with self.phases.phase("load", "data"):
            self.progress("load", 0.0)
            with self.ranks.first():
                dataset = open_dataset(self.job)
            facts.dataset = dataset.facts(cell.dataset)
            facts.flag_evaluation(cell, facts.dataset)
        specs = encoder_specs(cell, method)
        check_encoders(specs)
        use = EncoderUse.of(cell, method)
        shapes = {modality: encoder_shape(spec, modality) for modality, spec in specs.items()}
        builder = ModelBuilder(method, cell.training, DataSize.of(dataset), shapes)
        states = self._load_states(use, builder, dataset) if use.cached or use.given else {}
        store, views = self._load_encoders(use.run, dataset, states)
        with self.phases.phase("adapt"):
            model = builder.build(views, cell.seed, self.initial)
            check_equal(model, self.ranks)
            if cell.training.shard:
                shard(model, self.ranks)
            model.to(self.device)
            if cell.training.compile and compile_model(model):
                facts.setup = "compiling"
            elif cell.training.compile:
                facts.flag("not-compiled", "nothing trains: nothing to compile")
            facts.flag_encoders(cell, specs, model)
            facts.parameters = parameter_counts(model, method)
        trainer = self._trainer(model, method, dataset, store, cell.seed)
        if cell.training.cuda_graphs:
            self._replay_graphs(trainer)
        facts.trainer = trainer
        seed_generators(cell.seed)
        return trainer

    def _trainer(self, model: Recommender, method: Method, dataset: Dataset, store: ItemStore, seed: int) -> Trainer:
        trainer = Trainer(
            self.cell,
            model,
            method,
            dataset,
            store,
            self.phases,
            self.device,
            self.progress,
            kept=self.kept,
            build=self.fork,
            seed=seed,
            ranks=self.ranks,
        )
        of = self.facts.trainer
        if self.job.save_adapters and (of is None or of.delta is not None):
            path = self.job.folder / f".attempt-{self.job.attempt}.adapter-{next(self._deltas)}"
            trainer.delta = DeltaFile(path, writes=self.ranks.rank == 0)
        return trainer

    def fork(self, method: Method, seed: int) -> Trainer:
        """The trainer of a fresh model of the cell, adapted by ``method``, on the data that is loaded.

        Raises UserError where ``method`` reads inputs that the cell did not load.
        """
        cell, of = self.cell, self.facts.trainer
        assert of is not None
        seed_generators(seed)
        shapes = {modality: encoder_shape(spec, modality) for modality, spec in encoder_specs(cell, method).items()}
        builder, use = ModelBuilder(method, cell.training, DataSize.of(of.dataset), shapes), EncoderUse.of(cell, method)
        reads, held = builder.item_encoder.reads, of.model.item_encoder.reads
        if (
            any(reads[m] != held.get(m) for m in (*use.cached, *use.given))
            or not use.run.keys() <= of.model.views.keys()
        ):
            raise UserError(f"{cell.label}: a fork reads hidden states that are not cached; set cached = false")
        own = create(cell.method, cell.options, self.job.methods_path)
        alike = (type(method), method.config) == (type(own), own.config)
        if use.cached and starts_from_weights(method) and not alike:
            raise UserError(f"{cell.label}: a fork starts from weights that are not cached; set cached = false")
        views = {modality: load_encoder(spec, modality, seed=cell.seed).view for modality, spec in use.run.items()}
        model = builder.build(views, seed, self.initial if alike else None).to(self.device)
        if cell.training.compile:
            compile_model(model)
        fork = self._trainer(model, method, of.dataset, of.store, seed)
        if cell.training.cuda_graphs:
            replay_graphs(fork)
        seed_generators(seed)
        return fork

    def _load_states(
        self, use: EncoderUse, builder: ModelBuilder, dataset: Dataset
    ) -> dict[Modality, Table | ItemShard]:
        """Cached and precomputed hidden states; separate processes build the caches that are missing."""
        method, reads, given = builder.method, builder.item_encoder.reads, {}
        for modality, spec in use.given.items():
            file = StatesFile.open(spec)
            given[modality] = file.read(reads[modality], dataset.item_names)
            self.facts.encoders[modality] = file.facts(spec)
        jobs = [feature_job(self.job, method, m, spec, reads[m]) for m, spec in use.cached.items()]
        fingerprint = self.cell.dataset_fingerprint
        stored = stored_states(jobs, given, fingerprint, self.device, self.phases, self.progress, self.ranks)
        self.facts.cache, self.initial = stored.cache, stored.initial
        if stored.cache is not None:
            size = Reading(value=stored.cache.bytes, source="(N+1) x levels x width x 2 bytes")
            self.facts.counters["cache_bytes"] = size
        for modality in stored.rebuilt:
            self.facts.flag(REBUILT, f"the feature cache of the {modality} encoder was damaged and was built again")
        origin = "cached" if jobs else "precomputed"
        self.facts.flag("cache-placement", f"{origin} states are kept in {PLACES[stored.placement]}")
        return stored.tables

    def _load_encoders(
        self, specs: Mapping[Modality, EncoderSpec], dataset: Dataset, states: Mapping[Modality, Table | ItemShard]
    ) -> tuple[ItemStore, dict[Modality, EncoderView]]:
        """The encoders that run, and the inputs of items for them beside the ``states`` of the others."""
        if states and not specs:
            return item_store(self.job, dataset, specs, states), {}
        with self.phases.phase("load", "encoders"):
            self.progress("load encoders", 0.0)
            with self.ranks.first():
                store = item_store(self.job, dataset, specs, states)
            encoders = {m: load_encoder(spec, m, seed=self.cell.seed) for m, spec in specs.items()}
            self.facts.encoders |= {m: encoder.facts_on(self.cell.device) for m, encoder in encoders.items()}
            return store, {modality: encoder.view for modality, encoder in encoders.items()}

    def _replay_graphs(self, trainer: Trainer) -> None:
        reason = replay_graphs(trainer)
        if reason is None:
            self.facts.setup = "recording CUDA graphs"
        else:
            self.facts.flag("no-cuda-graphs", f"steps are not recorded as CUDA graphs: {reason}")

    def _failed(self, error: BaseException) -> Status:
        if not isinstance(error, (UserError, TimeLimitReached)):
            traceback.print_exception(error)
        error.__traceback__ = None  # its frames keep every tensor of the step alive
        gc.collect()
        last = self.phases.phases[-1] if self.phases.phases else None
        phase = f"{last.kind} {last.name}".strip() if last else "start"
        self.facts.failure = failure_of(error, phase, self.facts.trainer)
        return status_of(error)

    # --- its record -------------------------------------------------------------------------------------------------

    def record(self, status: Status) -> CellResult:
        """Write ranks and samples, and return the record; call it after the instruments have stopped."""
        facts = self.facts
        outcome = facts.trainer.outcome if facts.trainer else Outcome()
        last = self.phases.phases[-1] if self.phases.phases else None
        warmup = outcome.warmup_epochs
        if facts.setup and outcome.epochs and not warmup:
            message = f"{facts.setup} is part of the epoch time: with fewer than three epochs there is no warm-up epoch"
            facts.flag("setup-in-time", message)
        for name in self.kept.damaged:
            facts.flag(REBUILT, f"part '{name}' of the procedure was damaged on disk and was done again")
        arrays = {"samples": samples(outcome, self.phases.samples, self.device)}
        if facts.trainer is not None and outcome.test_ranks is not None and status == "ok":
            arrays["ranks"] = ranks(facts.trainer.dataset, outcome.test_ranks)
        files = {name: save_arrays(self.job.file(f".{name}.npz"), values) for name, values in arrays.items()}
        files |= self._adapter(status)
        return CellResult(
            cell_id=self.job.cell_id,
            attempt=self.job.attempt,
            cell=self.cell,
            code_version=self.job.code_version,
            status=status,
            failure=facts.failure,
            started_at=self.started_at.isoformat(timespec="seconds"),
            wall_s=last.start_s + last.wall_s if last else 0.0,
            time_limit_s=self.job.time_limit_s,
            environment=environment(self.device),
            dataset=facts.dataset,
            text_encoder=facts.encoders.get("text"),
            image_encoder=facts.encoders.get("image"),
            parameters=facts.parameters,
            phases=tuple(self.phases.phases),
            epochs=tuple(outcome.epochs),
            warmup_epochs=warmup,
            best_epoch=outcome.best_epoch,
            epoch_time_s=epoch_time(outcome),
            all_in_s=all_in(self.phases.phases, facts.cache, self.kept.resumed_s, status),
            training_memory=self.phases.training_memory(outcome.first_phase) if outcome.epochs else None,
            cache=facts.cache,
            inference=facts.inference,
            representation=facts.representation,
            counters=facts.counters | self.phases.counters(),
            flags=(*facts.flags, *self.phases.flags()),
            files=files,
            digests={name: sha256_of(self.job.folder / file) for name, file in files.items()},
        )

    def _adapter(self, status: Status) -> dict[str, str]:
        """The file of what was trained, of an attempt that ended well; those of forks that were not adopted go."""
        delta = self.facts.trainer.delta if self.facts.trainer else None
        published = delta.publish(self.job.file(".adapter.safetensors")) if delta and status == "ok" else None
        for left in self.job.folder.glob(f".attempt-{self.job.attempt}.adapter-*"):
            left.unlink()
        return {"adapter": published} if published else {}


def main() -> None:
    """Run the job whose file is the first argument; the exit code is 0 whenever a record was written."""
    job = Job.model_validate_json(Path(sys.argv[1]).read_bytes())
    launcher = die_with_launcher()

    def stop(_number: int, _frame: object) -> NoReturn:
        if launcher is None or time.monotonic() < launcher.deadline_s:  # of Slurm, say: the launcher records it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise TimeLimitReached(time_limit_message(job.time_limit_s))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the launcher ignores it
    with progress_events() as progress, telling(progress):
        with measuring(own_device(job)) as phases:
            ranks, environments = join(job, phases)
            cell_run = CellRun(job, phases, progress if ranks.rank == 0 else _silent, ranks, environments)
            signal.signal(signal.SIGTERM, stop)
            if ranks.size > 1:
                show_where_it_hangs()
            status = cell_run.run()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the record comes next
        result = cell_run.record(status) if ranks.size == 1 else record_of_all(cell_run, status)
        if result is not None:
            write_result(result, job.file(".json"))
            if status == "ok":
                cell_run.kept.clear()


def _silent(_what: str, _share: float) -> None:
    """Progress of ranks other than 0."""


if __name__ == "__main__":
    main()
