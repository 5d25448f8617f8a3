"""Live logging: what is logged, when, and that it neither changes nor stops what is measured."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from tpme.bench import cli, mlflow_server
from tpme.bench.errors import UserError, missing_extra
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.quantities import memory_reading
from tpme.bench.record import CellResult, Phase
from tpme.bench.run import cell, live, live_cell
from tpme.bench.run.engines.local import LocalEngine
from tpme.bench.run.live import LiveLog, parse_epoch
from tpme.bench.train.loop import Trainer

CURVES = ("train_s", "loss", "valid_recall_10", "valid_ndcg_10")


@dataclass
class Board:
    """What a stand-in for TensorBoard was given: (name, epoch) -> value by folder, in the order of the folders."""

    runs: dict[Path, dict[tuple[str, int], float]] = field(default_factory=dict)
    closed: list[Path] = field(default_factory=list)
    when_logged: Callable[[Path], None] = lambda folder: None


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    made = Board()

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.folder = Path(log_dir)
            made.runs[self.folder] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            made.when_logged(self.folder)
            made.runs[self.folder][tag, global_step] = scalar_value

        def flush(self) -> None: ...

        def close(self) -> None:
            made.closed.append(self.folder)

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def log_to(run: Path, logger: str = "tensorboard") -> tuple[LiveLog, io.StringIO]:
    console = Console(file=io.StringIO(), width=200)
    return LiveLog(logger, run, console), console.file  # type: ignore[return-value]


def test_every_epoch_is_logged_as_it_ends(world: Any, board: Board, tmp_path: Path) -> None:
    early: list[bool] = []
    board.when_logged = lambda _folder: early.append(not list(tmp_path.rglob("attempt-1.json")))
    logger, said = log_to(tmp_path)
    trained, untrained = world.run(
        world.matrix(["id", "popularity"], training={"epochs": 3}), tmp_path, engine=LocalEngine(live=logger)
    )
    assert trained.status == untrained.status == "ok"
    assert early[0], "before there is a record"
    (folder, values), (_, nothing) = board.runs.items()
    assert folder.parts[-3:-1] == ("tensorboard", f"id-{trained.cell_id}")
    assert nothing == {}
    assert list(board.runs) == board.closed
    for epoch in trained.epochs:
        assert [values[f"epoch_{name}", epoch.index] for name in CURVES] == [getattr(epoch, name) for name in CURVES]
        assert {name: values[f"epoch_losses/{name}", epoch.index] for name in epoch.losses} == epoch.losses
    assert {epoch for _, epoch in values} == {1, 2, 3}
    assert values["memory_bytes", 3] == memory_reading("memory_bytes", trained.training_memory, "cpu").value
    peaks = [values["peak_bytes", epoch] for epoch in (1, 2, 3)]
    assert peaks == sorted(peaks)
    whole = [memory_reading("memory_bytes", phase.memory, "cpu").value for phase in up_to_the_last_epoch(trained)]
    assert peaks[-1] == max(value for value in whole if value is not None)
    assert said.getvalue() == ""


def up_to_the_last_epoch(result: CellResult) -> list[Phase]:
    """The phases before those of the trained model's export."""
    return result.phases[: [phase.kind for phase in result.phases].index("export")]


def test_an_epoch_is_reported_between_phases_and_only_by_its_own_entry(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_at: list[tuple[str | None, str]] = []

    def seen(trainer: Trainer) -> str:
        open_at.append((trainer.phases.open_kind, trainer.phases.phases[-1].kind))
        return "{}"

    matrix, read, write = world.matrix(["bitfit"], training={"epochs": 2}), *os.pipe()
    monkeypatch.setattr(live_cell, "epoch_line", seen)
    monkeypatch.setattr(live_cell.os, "dup", lambda _: write)
    monkeypatch.setattr(cell, "main", lambda: world.tell(matrix, tmp_path))
    world.tell(matrix, tmp_path)
    assert open_at == [], "off by default"
    monkeypatch.setattr(Trainer, "_recorded_epoch", Trainer._recorded_epoch)  # put back at the end
    live_cell.main()
    assert len(open_at) == 2
    assert all(kind is None and last in ("validate", "rank") for kind, last in open_at)
    assert os.read(read, 100) == b"{}\n{}\n"
    os.close(read)
    live_cell.os.close(write)


def test_nothing_that_logs_is_loaded_in_the_cell(harness: ModuleType) -> None:
    code = "import sys, tpme.bench.run.live_cell; sys.exit(any(m in sys.modules for m in ('mlflow', 'tensorboard')))"
    assert harness.subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_long_run_is_reported_in_a_moment(world: Any, tmp_path: Path) -> None:
    """A line of the 100th epoch, with its 300 phases."""
    job = world.job(world.matrix(["id"]), tmp_path)
    cell_run = cell.CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None)
    assert cell_run.run() == "ok"
    trainer = cell_run.facts.trainer
    assert trainer is not None
    trainer.phases.phases *= 100
    started = time.perf_counter()
    line = live_cell.epoch_line(trainer)
    assert time.perf_counter() - started < 0.1
    assert len(line) < 4096, "a pipe takes it at once"


def test_a_server_that_does_not_answer_holds_up_nothing(
    world: Any, board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PATIENCE_S", 0.1)
    answers = threading.Event()
    board.when_logged = lambda _folder: bool(answers.wait(60))  # type: ignore[assignment, return-value]
    logger, said = log_to(tmp_path)
    job = world.job(world.matrix(["id"]), tmp_path)
    started = time.monotonic()
    with logger.lines_of(job) as hear:
        for epoch in range(1000):
            hear(json.dumps({"epoch": epoch, "values": {"epoch_loss": 1.0}}))
    assert time.monotonic() - started < 5
    assert said.getvalue().endswith("not logged to the end  still at it 0.1 s after the cell's end\n")
    answers.set()


def test_a_cell_runs_on_where_logging_fails(world: Any, board: Board, tmp_path: Path) -> None:
    def full(_folder: Path) -> None:
        raise OSError("no [space] left")

    board.when_logged = full
    logger, said = log_to(tmp_path)
    [result] = world.run(world.matrix(["id"], training={"epochs": 2}), tmp_path, engine=LocalEngine(live=logger))
    assert (result.status, len(result.epochs)) == ("ok", 2)
    assert said.getvalue().count("\n") == 1
    assert "id                 not logged to the end  OSError: no [space] left" in said.getvalue()


def test_other_lines_are_no_epochs() -> None:
    assert parse_epoch('{"epoch": 2, "values": {"epoch_loss": 1}}') == (2, {"epoch_loss": 1.0})
    for line in ("", "words of a library", "3", '{"what": "load", "share": 1}', '{"epoch": 1, "values": [1]}'):
        assert parse_epoch(line) is None


# --- before anything runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logger", "missing", "message"),
    [
        ("wandb", "wandb", "--log wandb: choose tensorboard or mlflow"),
        (
            "tensorboard",
            "torch.utils.tensorboard",
            str(missing_extra("--log tensorboard", "tensorboard", "tensorboard")),
        ),
        ("mlflow", "mlflow", str(missing_extra("--log mlflow", "mlflow", "mlflow"))),
    ],
)
def test_what_cannot_log_is_one_line_before_anything_runs(
    logger: str,
    missing: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["tpme", "run", "demo", "--out", str(tmp_path / "run"), "--log", logger])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"tpme: {message}\n"
    assert not (tmp_path / "run").exists()


# --- the real ones --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mlflow_takes_it(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other that needs no server
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    for name, value in mlflow_server.SETTINGS.items():
        monkeypatch.setenv(name, value)
    logger, said = log_to(tmp_path / "run", "mlflow")
    assert logger.where.endswith("mlruns, experiment mine")
    [result] = world.run(
        world.matrix(["bitfit"], training={"epochs": 2}), tmp_path / "run", engine=LocalEngine(live=logger)
    )
    world.run(world.matrix(["id"], lr={"recommender": 1e30}), tmp_path / "run", engine=LocalEngine(live=logger))
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    statuses = {run.info.run_name: run.info.status for run in runs}
    assert statuses == {"bitfit, seed 12345": "FINISHED", "id, seed 12345": "FAILED"}
    [run] = [run for run in runs if run.info.status == "FINISHED"]
    losses = client.get_metric_history(run.info.run_id, "epoch_loss")
    assert [(one.step, one.value) for one in losses] == [(epoch.index, epoch.loss) for epoch in result.epochs]
    assert run.data.metrics["peak_bytes"] >= run.data.metrics["memory_bytes"]
    assert run.data.tags["tpme.cell_id"] == result.cell_id
    assert said.getvalue() == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "bogus://x")
    with pytest.raises(UserError, match=r"--log mlflow: .*; MLFLOW_TRACKING_URI says which server is used"):
        log_to(tmp_path / "run", "mlflow")


@pytest.mark.slow
def test_tensorboard_takes_it(world: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, said = log_to(tmp_path)
    [result] = world.run(world.matrix(["bitfit"], training={"epochs": 2}), tmp_path, engine=LocalEngine(live=logger))
    [folder] = (tmp_path / "tensorboard").glob("*/attempt-1")
    assert [path.name.split(".")[4] for path in folder.iterdir()] == ["host"], "not the name of this one"
    events = EventAccumulator(str(folder)).Reload()
    losses = [(one.step, one.value) for one in events.Scalars("epoch_loss")]
    assert losses == [(epoch.index, pytest.approx(epoch.loss)) for epoch in result.epochs]
    assert said.getvalue() == ""
