"""``Recorder``: measures any training loop with the suite's own instruments and writes an ordinary record of it.

    with Recorder(task="reviews", method="lora", settings={"model": "tiny"}, seed=1) as run:
        run.model(model)
        for epoch in (1, 2, 3):
            with run.phase("train", epoch=epoch):
                for batch in batches:
                    ...
                    run.step()
            with run.phase("validate"):
                run.metric("accuracy", accuracy(), higher_is_better=True)

The record goes to ``runs/reviews/cells``, so ``tpme report runs/reviews`` shows it. An error is recorded, then goes on.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from filelock import FileLock
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.limits import expanded
from tpme.bench.measure.phases import PhaseLog, measuring
from tpme.bench.measure.sampler import PERIOD_S
from tpme.bench.names import check_line, check_name
from tpme.bench.record import (
    Cell,
    CellResult,
    Failure,
    Flag,
    NamedMetric,
    Parameters,
    Reading,
    Status,
    attempt_number,
    cell_id,
    write_result,
)
from tpme.bench.recorder.modelled import batch_flops, bytes_on_disk, count_parameters, first_not_finite
from tpme.bench.recorder.program import program_environment, rank, script_version, world_size
from tpme.bench.recorder.stretches import TimeOf
from tpme.bench.recorder.timeline import Timeline
from tpme.bench.task.fingerprint import sha256_of
from tpme.bench.train.ending import failure_of, status_of
from tpme.bench.train.facts import all_in, samples, save_arrays
from tpme.bench.train.libraries import load_libraries
from tpme.bench.writing import make_folder

CPU_PERIOD_S = 0.1
"""Time between two readings of the sampler on a CPU, where they take cores from the training. No peak depends on it."""

if TYPE_CHECKING:
    from tpme.bench.recorder.lightning_callback import LightningRecorder
    from tpme.bench.recorder.trainer_callback import TrainerRecorder

OWN_TASK = "recommendation"
"""What the suite trains itself; no recorded training shares its tables."""


class Recorder:
    """Records one training: ``with Recorder(...) as run``.

    Rows that agree in task, settings, dataset, ``time_of`` and device form a group of comparable rows. Of several
    processes that train together the first alone records.

    Args:
        task: what is trained for; also the name of the run folder. method: the row.
        settings: what the rows share (model, batch, lengths); options: settings of the method; both become JSON.
        dataset, dataset_fingerprint: the data; the latter is whatever changes with it.
        seed: another one is another cell, the same one another attempt. By default that of the Trainer, or of torch.
        baseline: a row that adapts nothing.
        time_of: what T is the time of: ``"epoch"``, ``"250 steps"``, ``"1000 samples"``.
        folder: of the run; by default ``runs/TASK``. device: by default the current GPU, else the CPU.
        version: of the code; by default a hash of the program's own file.

    Raises:
        UserError: a setting that cannot be recorded, or a folder that cannot be written to.
    """

    def __init__(
        self,
        *,
        task: str,
        method: str,
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        dataset: str = "",
        dataset_fingerprint: str = "",
        seed: int | None = None,
        baseline: bool = False,
        time_of: str = "epoch",
        folder: str | Path | None = None,
        device: str | torch.device | None = None,
        version: str | None = None,
    ) -> None:
        for what, name in (("task", task), ("method", method)):
            _checked(what, name, check_name)
        for what, line in (("dataset", dataset), ("dataset_fingerprint", dataset_fingerprint)):
            _checked(what, line, check_line)
        if task == OWN_TASK:
            raise UserError(f"task: {OWN_TASK!r} is what 'tpme run' trains and ranks; give your task a name of its own")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise UserError(f"seed: it is a whole number, not {seed!r}")
        self.device = _device(device)
        self.folder = expanded(Path(folder)) if folder is not None else Path("runs") / task
        self.seed = seed
        """Of the cell; a callback fills it in where none was given."""
        self._time_of = TimeOf.parse(time_of)
        self._version = script_version() if version is None else _checked("version", version, check_name)
        self._cell = Cell(
            task=task,
            method=method,
            settings=_json("settings", settings),
            options=_json("options", options),
            dataset=dataset,
            dataset_fingerprint=dataset_fingerprint,
            modalities=(),
            device="cuda" if self.device.type == "cuda" else "cpu",
            baseline=baseline,
        )
        self.timeline: Timeline | None = None
        """The phases; None before the recording, and in processes that do not record."""
        self.path: Path | None = None
        """The record, once it is written."""
        self._entered = self._records = False
        self._model: nn.Module | None = None
        self._parameters: Parameters | None = None
        self._stored: Path | None = None
        self._metrics: dict[str, NamedMetric] = {}
        self._counters: dict[str, Reading] = {}
        self._flags: list[Flag] = []
        self._instruments: AbstractContextManager[PhaseLog] | None = None

    # --- from beginning to end --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._entered:
            raise UserError("a Recorder records one training: make another one for the next")
        self._entered = True
        if rank() > 0:
            return self
        self._require_writable()
        self._records, self._started_at = True, datetime.now(UTC)
        self._instruments = measuring(self.device, CPU_PERIOD_S if self.device.type == "cpu" else PERIOD_S)
        self._log = self._instruments.__enter__()
        with torch.random.fork_rng():
            load_libraries(self.device)
        self._froze = not gc.get_freeze_count()
        if self._froze:
            gc.freeze()  # a million library objects: the collection at the start of each phase skips them
        self._log.baseline()
        self.timeline = Timeline(self._log, self.device, self._time_of)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._instruments is None:
            return
        timeline, self.timeline = self.timeline, None
        assert timeline is not None
        try:
            timeline.finish(error)
            if error is None:
                with self._log.phase("count", "parameters"):
                    self._count()
        finally:
            self._instruments.__exit__(None, None, None)
            if self._froze:
                gc.unfreeze()
            self._model, self._instruments = None, None
        if isinstance(error, KeyboardInterrupt) or rank() > 0:  # Ctrl-C leaves no record
            return
        failure, status = self._ending(error, timeline)
        try:
            self._publish(timeline, status, failure)
        except (OSError, UserError) as problem:
            if error is None:
                raise UserError(f"the record cannot be written: {problem}") from None
            error.add_note(f"the record of this failure cannot be written: {problem}")

    @contextmanager
    def phase(self, kind: str, *, epoch: int | None = None, name: str = "") -> Iterator[None]:
        """Measure the block as one phase: ``train``, ``validate``, ``export`` (saving), ``prepare``, ``inference`` ...

        T and M are those of the ``train`` phases. An epoch may have several. Raises UserError where phases nest.
        """
        timeline = self._recording()
        if timeline is None:
            yield
            return
        timeline.begin(kind, epoch, name)
        try:
            yield
        except BaseException as error:
            timeline.end(error)
            raise
        timeline.end()
        self._count_parameters()

    def step(self, loss: Tensor | float | None = None, *, samples: int = 0) -> None:
        """Say that an optimiser step has ended. Raises UserError outside a ``train`` phase.

        Args:
            loss: of the step; read after the phase, so the host does not wait for it. One that is not finite makes the
                row ``diverged``. samples: that it trained on, for ``time_of="1000 samples"``.
        """
        if self._time_of.unit == "samples" and samples < 1:
            raise UserError(f"run.step(samples=...) is needed: T is the time of {self._time_of.text}")
        if (timeline := self._recording()) is not None:
            timeline.step(loss, samples)

    # --- what is known of the training ------------------------------------------------------------------------------

    def metric(self, name: str, value: float | Tensor, *, higher_is_better: bool) -> None:
        """Record a quality. Of each name the last value is the result; the first name is the main metric."""
        _checked("metric", name, check_name)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"metric '{name}': its value is a number, not {value!r}") from None
        if name in self._metrics and self._metrics[name].higher_is_better != higher_is_better:
            raise UserError(f"metric '{name}': higher_is_better was {not higher_is_better} before")
        if (timeline := self._recording()) is None:
            return
        reading = Reading.missing("the training program", f"it is {number}")
        if math.isfinite(number):
            reading = Reading(value=number, source="the training program")
            timeline.steps.metrics[timeline.steps.count][name] = number
        self._metrics[name] = NamedMetric(value=reading, higher_is_better=higher_is_better)

    def model(self, model: nn.Module) -> None:
        """Count the parameters of ``model`` by ``requires_grad``, now and after every phase."""
        if not isinstance(model, nn.Module):
            raise UserError(f"run.model() takes a torch module, not {type(model).__name__}")
        if self._recording() is not None:
            self._model = model
            self._count_parameters()

    def stored(self, path: str | Path) -> None:
        """Say where the trained parameters were saved; without it, their bytes in memory count."""
        if self._recording() is not None:
            bytes_on_disk(Path(path))
            self._stored = Path(path)

    def flops(self, loss_of: Callable[[], Tensor], *, batches: int = 1) -> None:
        """Count the FLOPs of a step by running a batch forward and backward, in a phase of its own.

        Args:
            loss_of: computes the loss of one batch. batches: that one optimiser step accumulates.
        """
        timeline = self._recording()
        if timeline is None:
            return
        with self.phase("count", name="FLOPs"):
            for name, reading in batch_flops(loss_of, self._model).items():
                value = reading.value * batches if reading.value is not None else None
                self._counters[name] = reading.model_copy(update={"value": value})

    def flag(self, code: str, message: str) -> None:
        """Say what a reader must know before trusting a number: it becomes a footnote of the row."""
        if all(flag.code != code for flag in self._flags):
            self._flags.append(Flag(code=_checked("flag", code, check_name), message=message))

    # --- other people's loops ---------------------------------------------------------------------------------------

    def trainer_callback(self, metrics: Mapping[str, bool] | None = None) -> TrainerRecorder:
        """A callback for the Trainer of transformers, and those of TRL.

        Args:
            metrics: name of each evaluated quality -> whether higher is better; by default ``eval_loss``, lower.
        """
        from tpme.bench.recorder.trainer_callback import TrainerRecorder

        return TrainerRecorder(self, metrics or {"eval_loss": False})

    def lightning_callback(self, metrics: Mapping[str, bool]) -> LightningRecorder:
        """A callback for Lightning's Trainer; ``metrics`` as the module logs them, name -> whether higher is better."""
        from tpme.bench.recorder.lightning_callback import LightningRecorder

        return LightningRecorder(self, metrics)

    # --- the record -------------------------------------------------------------------------------------------------

    def _recording(self) -> Timeline | None:
        """The timeline; None in a process that does not record. Raises UserError outside the ``with`` block."""
        if self.timeline is None and (self._records or not self._entered):
            raise UserError("the Recorder records within its 'with' block alone: with Recorder(...) as run")
        return self.timeline

    def _require_writable(self) -> None:
        try:
            make_folder(self.folder / "cells")
            with FileLock(self.folder / ".lock"):
                pass
        except (OSError, NotImplementedError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{self.folder}: cannot be written to ({why}); name another place, folder=...") from None

    def _count_parameters(self) -> None:
        if self._model is not None:
            self._parameters = count_parameters(self._model, self._parameters)

    def _count(self) -> None:
        """What needs the trained model, after everything that is measured."""
        self._not_finite = None
        if self._model is not None and self._parameters is not None:
            self._not_finite = first_not_finite(self._model)
        if self._stored is not None and self._parameters is not None:
            size = bytes_on_disk(self._stored)
            self._parameters = self._parameters.model_copy(update={"stored_bytes": size})

    def _ending(self, error: BaseException | None, timeline: Timeline) -> tuple[Failure | None, Status]:
        """How it ended, and as which status."""
        bad = timeline.steps.not_finite
        if bad is not None:
            where = f" of epoch {bad.epoch}" if bad.epoch else ""
            message = f"the loss is not finite at step {bad.step}{where}; try a lower learning rate"
            return Failure(phase="train", message=message, epoch=bad.epoch or None, step=bad.step), "diverged"
        if error is not None:
            assert timeline.failure is not None
            _, phase, epoch, step = timeline.failure
            failure = failure_of(error, phase, None).model_copy(update={"epoch": epoch, "step": step})
            return failure, status_of(error)
        if self._not_finite is not None:
            message = f"parameter '{self._not_finite}' is not finite after training; try a lower learning rate"
            return Failure(phase="train", message=message, epoch=timeline.epoch or None), "diverged"
        return None, "ok"

    def _publish(self, timeline: Timeline, status: Status, failure: Failure | None) -> None:
        """Write samples and record as the next attempt at the cell."""
        cell = self._cell.model_copy(update={"seed": torch.initial_seed() if self.seed is None else self.seed})
        identity = cell_id(cell, self._version)
        slug = re.sub(r"[^A-Za-z0-9]+", "-", cell.label).strip("-") or "method"
        folder = self.folder / "cells" / f"{slug}-{identity}"
        outcome, log, processes = timeline.steps.outcome(), self._log, world_size()
        if processes > 1:
            message = f"trained by {processes} processes: T, M, energy and steps are those of the first"
            self.flag("first-process", message)
        make_folder(folder)
        with FileLock(self.folder / ".lock"):
            attempt = 1 + max(map(attempt_number, folder.glob("attempt-*.json")), default=0)
            file = save_arrays(folder / f"attempt-{attempt}.samples.npz", samples(outcome, log.samples, self.device))
            last = log.phases[-1]
            result = CellResult(
                cell_id=identity,
                attempt=attempt,
                cell=cell,
                code_version=self._version,
                status=status,
                failure=failure,
                started_at=self._started_at.isoformat(timespec="seconds"),
                wall_s=last.start_s + last.wall_s,
                environment=program_environment(self.device, processes),
                parameters=self._parameters,
                phases=tuple(log.phases),
                epochs=tuple(outcome.epochs),
                warmup_epochs=outcome.warmup_epochs,
                epoch_time_s=timeline.steps.time(outcome),
                time_of=self._time_of.text,
                all_in_s=all_in(log.phases, None, 0.0, status),
                training_memory=log.training_memory() if timeline.steps.done else None,
                counters=self._counters | log.counters(),
                metrics=self._metrics,
                flags=(*self._flags, *log.flags()),
                files={"samples": file},
                digests={"samples": sha256_of(folder / file)},
            )
            self.path = folder / f"attempt-{attempt}.json"
            write_result(result, self.path)


def _checked(what: str, text: str, check: Callable[[str], str]) -> str:
    if not isinstance(text, str):
        raise UserError(f"{what}: it is a text, not {text!r}")
    try:
        return check(text)
    except ValueError as error:
        raise UserError(f"{what} {text!r}: {error}") from None


def _json(what: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values as JSON holds them, so that the record reads as it was written."""
    try:
        found = json.loads(json.dumps(dict(values or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: only names with numbers, texts, lists and dicts can be recorded: {error}") from None
    assert isinstance(found, dict)
    return found


def _device(device: str | torch.device | None) -> torch.device:
    """The device as it is recorded; by default the current GPU, else the CPU."""
    try:
        found = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device: {str(error).splitlines()[0]}") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device: runs are recorded on 'cpu' or 'cuda', not {found.type!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: this machine has no CUDA device; leave it out, or say device='cpu'")
    return found
