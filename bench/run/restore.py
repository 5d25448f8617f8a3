"""Restores a trained model from its record and the delta that ``tpme run --save-adapters`` wrote beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tpme.bench.errors import UserError
from tpme.bench.limits import resolved
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import read_result
from tpme.bench.run.cell import CellRun
from tpme.bench.run.job import Job
from tpme.bench.run.launch import store_folder
from tpme.bench.run.matrix import MatrixFile
from tpme.bench.side_files import side_file
from tpme.bench.train.delta import DeltaFacts, read_delta
from tpme.bench.train.loop import Trainer
from tpme.methods.base import Method
from tpme.methods.registry import available, method_class


def restore(
    record: Path,
    *,
    dataset: Path,
    store: Path | None = None,
    methods_path: Sequence[Path] = (),
    device: str | None = None,
) -> Trainer:
    """Build a fresh model of the cell of ``record`` and load its delta, as of the best epoch. Returns its trainer.

    The model is not prepared for inference.

    ``validate()`` of the returned trainer ranks the test targets again (``outcome.test_ranks``).

    Args:
        record: of an attempt that saved its adapter. dataset: the prepared folder. store: as for ``tpme run``.
        methods_path: folders with further methods. device: ``cpu`` or ``cuda``; by default that of the record.

    Raises:
        UserError: the record has no adapter file, or data, encoders or method are not those of the record.
    """
    result = read_result(record)
    adapter = side_file(record, result, "adapter")
    if adapter is None:
        raise UserError(f"{record}: it has no adapter file; run its matrix with --save-adapters")
    facts, state = read_delta(adapter)
    job = Job(
        cell=result.cell.model_copy(update={"device": device or result.cell.device}),
        cell_id=result.cell_id,
        attempt=result.attempt,
        code_version=result.code_version,
        dataset_path=dataset,
        store=store_folder(store),
        folder=record.parent,
        methods_path=tuple(map(resolved, methods_path)),
        cache_limit_bytes=MatrixFile.model_fields["cache_limit_bytes"].default,
        time_limit_s=result.time_limit_s or 0.0,
    )
    run = CellRun(job, PhaseLog(job.cell.device, None, None), lambda _what, _share: None)
    trainer = run.prepare()
    if facts != DeltaFacts.of(trainer.method, trainer.seed):  # a search has ended with another model
        trainer = run.fork(_final_method(trainer.method, facts, record, job.methods_path), facts.seed)
    trainer.method.load_state(trainer.model, state)
    trainer.model.eval()
    return trainer


def _final_method(driver: Method, facts: DeltaFacts, record: Path, methods_path: Sequence[Path]) -> Method:
    """The method that the procedure of ``driver`` ended with: of a class in its module, or of a registered one."""
    cls = getattr(sys.modules[type(driver).__module__], facts.method, None)
    if cls is None:
        registered = (method_class(name, methods_path) for name in available(methods_path))
        cls = next((one for one in registered if one.__qualname__ == facts.method), None)
    if cls is None:
        raise UserError(f"{record}: its model was adapted by {facts.method}, which is not in {type(driver).__module__}")
    method: Method = cls(cls.Config.model_validate_json(facts.options))
    return method
