"""``tpme run --log``: the epochs of a cell in TensorBoard or MLflow while it runs.

The cell writes a line an epoch (``tpme.bench.run.live_cell``); the launcher, which is not in the cell's process tree,
logs it. A thread does that: a slow server must not hold up the launcher, since a cell whose output nobody reads would
soon wait within a step.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from tpme.bench.errors import UserError, missing_extra, one_line
from tpme.bench.mlflow_server import open_experiment
from tpme.bench.record import RecordError, read_result
from tpme.bench.redact import without_credentials
from tpme.bench.run.job import Job

EXPERIMENT = "tpme-live"
"""MLflow experiment, unless MLFLOW_EXPERIMENT_NAME names another; ``tpme export --mlflow`` makes runs of its own."""
PATIENCE_S = 30.0
"""Longest wait, when a cell has ended, for what is not logged yet."""


class LoggedCell(Protocol):
    """The run of one cell in TensorBoard or MLflow."""

    def log(self, epoch: int, values: dict[str, float]) -> None:
        """Log the values of an epoch."""

    def close(self, ok: bool) -> None:
        """End the run; ``ok``: the cell ended well."""


class LiveLog:
    """Logs the cells of a run folder while they run.

    Args:
        logger: ``tensorboard`` or ``mlflow``. run: the run folder. console: takes a line where logging fails; the
            cells run on.

    Attributes:
        where: what the user opens to see the runs.

    Raises:
        UserError: an unknown logger, or one that is not installed or cannot be reached.
    """

    def __init__(self, logger: str, run: Path, console: Console) -> None:
        if logger not in LOGGERS:
            raise UserError(f"--log {logger}: choose {' or '.join(LOGGERS)}")
        self._console = console
        self._open, self.where = LOGGERS[logger](run)

    @contextlib.contextmanager
    def lines_of(self, job: Job) -> Iterator[Callable[[str], None]]:
        """A function that takes the lines a cell writes; it returns at once, and a thread logs them."""
        lines = SimpleQueue[str | None]()
        thread = threading.Thread(target=self._log, args=(job, lines), daemon=True)
        thread.start()
        try:
            yield lines.put
        finally:
            lines.put(None)
            thread.join(PATIENCE_S)
            if thread.is_alive():
                self._warn(job, f"still at it {PATIENCE_S:g} s after the cell's end")

    def _log(self, job: Job, lines: SimpleQueue[str | None]) -> None:
        try:
            cell = self._open(job)
            while (line := lines.get()) is not None:
                if (event := parse_epoch(line)) is not None:
                    cell.log(*event)
            cell.close(_ended_well(job))
        except Exception as error:  # the disk is full, the server is gone: no reason to stop what is measured
            self._warn(job, one_line(error))

    def _warn(self, job: Job, why: str) -> None:
        self._console.print(Text.assemble(f"{job.cell.label:<18} ", ("not logged to the end", "yellow"), f"  {why}"))


def parse_epoch(line: str) -> tuple[int, dict[str, float]] | None:
    """Number and values of an epoch from a line of ``live_cell.epoch_line``, or ``None`` for any other line."""
    try:
        event: Any = json.loads(line)
        return int(event["epoch"]), {str(name): float(value) for name, value in event["values"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _ended_well(job: Job) -> bool:
    with contextlib.suppress(RecordError, OSError):
        return read_result(job.file(".json")).status == "ok"
    return False


# --- loggers --------------------------------------------------------------------------------------------------------


def _tensorboard(run: Path) -> tuple[Callable[[Job], LoggedCell], str]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_extra("--log tensorboard", "tensorboard", "tensorboard") from None

    class Written:
        def __init__(self, job: Job) -> None:
            self.folder = run / "tensorboard" / job.folder.name / f"attempt-{job.attempt}"
            self.writer = SummaryWriter(str(self.folder))

        def log(self, epoch: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch)
            self.writer.flush()

        def close(self, ok: bool) -> None:
            self.writer.close()
            for file in self.folder.glob(f"events.*.{socket.gethostname()}.*"):  # nobody else needs to know it
                file.rename(file.with_name(file.name.replace(f".{socket.gethostname()}.", ".host.")))

    return Written, f"tensorboard --logdir {run / 'tensorboard'}"


def _mlflow(_run: Path) -> tuple[Callable[[Job], LoggedCell], str]:
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    client, home = open_experiment("--log mlflow", None, experiment)
    import mlflow
    from mlflow.entities import Metric

    class Tracked:
        def __init__(self, job: Job) -> None:
            tags = {"tpme.cell_id": job.cell_id, "tpme.attempt": str(job.attempt)}
            name = f"{job.cell.label}, seed {job.cell.seed}"
            self.run_id = client.create_run(home, tags=tags, run_name=name).info.run_id

        def log(self, epoch: int, values: dict[str, float]) -> None:
            time_ms = int(1000 * time.time())
            metrics = [Metric(name, value, time_ms, epoch) for name, value in values.items()]
            client.log_batch(self.run_id, metrics=metrics)

        def close(self, ok: bool) -> None:
            client.set_terminated(self.run_id, status="FINISHED" if ok else "FAILED")

    return Tracked, without_credentials(f"MLflow at {mlflow.get_tracking_uri()}, experiment {experiment}")


LOGGERS = {"tensorboard": _tensorboard, "mlflow": _mlflow}
