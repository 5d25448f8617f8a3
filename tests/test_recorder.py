"""Recorded trainings: what a plain loop leaves behind, however it ends, and what is refused."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paired_steps import added
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tpme.bench import Recorder
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, read_result
from tpme.bench.recorder.modelled import batch_flops, count_parameters
from tpme.bench.recorder.stretches import Steps, TimeOf
from tpme.bench.side_files import load_samples, side_file

CPU = torch.device("cpu")
INPUTS, LABELS = torch.randn(8, 16), torch.randint(0, 2, (8,))


def small() -> nn.Module:
    """A network of 16 x 4 + 4 frozen and 4 x 2 + 2 trainable parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def recorder(folder: Path, **changes: Any) -> Recorder:
    settings = {"task": "toy", "method": "head", "folder": folder, "seed": 1, "device": "cpu", "version": "v"}
    return Recorder(**(settings | changes))


def record(run: Recorder) -> CellResult:
    assert run.path is not None
    return read_result(run.path)


def train(run: Recorder, model: nn.Module, epochs: int = 4, steps: int = 3, loss_of: Any = None) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for epoch in range(1, epochs + 1):
        with run.phase("train", epoch=epoch):
            for _ in range(steps):
                loss = loss_of(epoch) if loss_of else cross_entropy(model(INPUTS), LABELS)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss)
        with run.phase("validate", epoch=epoch):
            run.metric("accuracy", 0.1 * epoch, higher_is_better=True)
            run.metric("loss", torch.tensor(1.0 / epoch), higher_is_better=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CellResult]:
    """A loop of four epochs, and its record."""
    folder = tmp_path_factory.mktemp("plain")
    with recorder(folder, settings={"model": "small", "sizes": (16, 2)}, options={"lr": 0.1}, dataset="noise") as run:
        model = small()
        run.model(model)
        run.flops(lambda: cross_entropy(model(INPUTS), LABELS), batches=2)
        train(run, model)
    return folder, record(run)


# --- what a record says ---------------------------------------------------------------------------------------------


def test_a_loop_becomes_an_ordinary_record(plain: tuple[Path, CellResult]) -> None:
    _, result = plain
    assert (result.status, result.failure, result.attempt, result.time_of) == ("ok", None, 1, "epoch")
    cell = result.cell
    assert (cell.task, cell.method, cell.dataset, cell.seed, cell.device) == ("toy", "head", "noise", 1, "cpu")
    assert (cell.settings, cell.options) == ({"model": "small", "sizes": [16, 2]}, {"lr": 0.1})
    assert result.parameters is not None
    assert (result.parameters.trainable, result.parameters.total) == (10, 78)
    assert result.parameters.stored_bytes == 40
    assert [(epoch.index, epoch.steps) for epoch in result.epochs] == [(1, 3), (2, 3), (3, 3), (4, 3)]
    assert result.warmup_epochs == 1
    assert result.epochs[2].metrics == {"accuracy": pytest.approx(0.3), "loss": pytest.approx(1 / 3)}
    assert list(result.metrics) == ["accuracy", "loss"]
    assert result.metrics["accuracy"].value.value == pytest.approx(0.4)
    assert [metric.higher_is_better for metric in result.metrics.values()] == [True, False]
    assert result.environment is not None
    assert result.environment.device_kind == "cpu"
    assert result.training_memory is not None
    assert result.training_memory.host_rss_bytes.value is not None
    # 2 batches of 8 x (16 x 4 + 4 x 2) multiply-adds; backward: of the last layer its weights alone.
    assert result.counters["forward_flops"].value == 2 * 2 * 8 * (64 + 8)
    assert result.counters["backward_flops"].value == 2 * 2 * 8 * 8


def test_training_lies_apart_from_everything_else(plain: tuple[Path, CellResult]) -> None:
    _, result = plain
    kinds = [phase.kind for phase in result.phases]
    assert kinds == ["load", "count", *["other", "train", "other", "validate"] * 4, "other", "count"]
    assert sum(phase.wall_s for phase in result.phases) == pytest.approx(result.wall_s)
    training = [phase.wall_s for phase in result.phases if phase.kind == "train"]
    assert [epoch.train_s for epoch in result.epochs] == training
    assert result.epoch_time_s.value == sorted(training[1:])[1]
    assert result.all_in_s is not None
    assert result.all_in_s.value == pytest.approx(sum(training))


def test_steps_and_memory_curve_lie_beside_the_record(plain: tuple[Path, CellResult]) -> None:
    folder, result = plain
    [path] = folder.rglob("attempt-1.json")
    file = side_file(path, result, "samples")
    assert file is not None
    samples = load_samples(file)
    assert samples.step_epoch.tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert samples.step_s.sum() <= sum(epoch.train_s for epoch in result.epochs)
    assert len(samples.sample_bytes)


@pytest.mark.slow
def test_a_report_shows_it(plain: tuple[Path, CellResult], tmp_path: Path) -> None:
    folder, _ = plain
    command = [sys.executable, "-m", "tpme.bench.cli", "report", str(folder), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert "accuracy" in (tmp_path / "report.md").read_text()


def test_the_same_seed_is_another_attempt_and_another_seed_another_cell(tmp_path: Path) -> None:
    for seed in (1, 1, 2):
        with recorder(tmp_path, seed=seed) as run:
            train(run, small(), epochs=1)
    found = sorted(record.relative_to(tmp_path / "cells") for record in tmp_path.rglob("attempt-*.json"))
    assert sorted(path.name for path in found) == ["attempt-1.json", "attempt-1.json", "attempt-2.json"]
    assert len({path.parent for path in found}) == 2


def test_stored_bytes_are_those_of_a_path_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(bytes(123))
    with recorder(tmp_path / "run") as run:
        run.model(small())
        run.stored(tmp_path / "adapter")
        with pytest.raises(UserError, match="no such file or folder"):
            run.stored(tmp_path / "nothing")
    parameters = record(run).parameters
    assert parameters is not None
    assert parameters.stored_bytes == 123


def test_the_most_that_trained_at_one_time_is_kept() -> None:
    model = small()
    before = count_parameters(model.requires_grad_(True), None)
    model[0].requires_grad_(False)
    after = count_parameters(model, before)
    assert (before.trainable, after.trainable, after.trainable_max) == (78, 10, 78)


def test_counting_flops_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].weight.grad = torch.ones(4, 16)
    state, generator = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    batch_flops(lambda: cross_entropy(model(INPUTS), LABELS), model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 16))
    assert model[3].weight.grad is None


# --- however it ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("it broke"), "error"), (torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), "oom")],
)
def test_an_exception_is_a_row_and_goes_on(tmp_path: Path, error: Exception, status: str) -> None:
    def loss_of(epoch: int) -> Tensor:
        if epoch == 3:
            raise error
        return torch.ones((), requires_grad=True)

    run = recorder(tmp_path)
    with pytest.raises(type(error)), run:
        train(run, small(), loss_of=loss_of)
    result = record(run)
    assert result.status == status
    assert result.failure is not None
    assert (result.failure.phase, result.failure.epoch, result.failure.step) == ("train epoch 3", 3, 1)
    assert str(error) in result.failure.message
    assert result.failure.bytes_requested == (2 << 30 if status == "oom" else None)
    assert [epoch.index for epoch in result.epochs] == [1, 2]
    assert result.metrics["accuracy"].value.value == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_makes_a_row_diverged(tmp_path: Path) -> None:
    with recorder(tmp_path) as run:
        train(
            run, small(), epochs=2, loss_of=lambda epoch: torch.tensor([1.0, torch.nan][epoch - 1], requires_grad=True)
        )
        run.metric("perplexity", torch.inf, higher_is_better=False)
    result = record(run)
    assert result.status == "diverged"
    assert result.failure is not None
    assert result.failure.message == "the loss is not finite at step 1 of epoch 2; try a lower learning rate"
    assert [epoch.loss for epoch in result.epochs] == [1.0, None]
    assert result.metrics["perplexity"].value.reason == "it is inf"


def test_a_parameter_that_is_not_finite_makes_a_row_diverged(tmp_path: Path) -> None:
    """So a loop that does not give its losses is known to have diverged, too."""
    with recorder(tmp_path) as run:
        model = small()
        run.model(model)
        with run.phase("train", epoch=1):
            run.step()
        with torch.no_grad():
            model[2].bias.fill_(torch.nan)
    result = record(run)
    assert result.failure is not None
    assert (result.status, result.failure.message.split(";")[0]) == (
        "diverged", "parameter '2.bias' is not finite after training",
    )  # fmt: skip


def test_an_error_that_the_loop_survives_is_no_failure(tmp_path: Path) -> None:
    """Its epoch is not whole: part of it may have run twice."""
    with recorder(tmp_path) as run:
        with contextlib.suppress(MemoryError), run.phase("train", epoch=1):
            run.step()
            raise MemoryError
        for epoch in (1, 2):
            with run.phase("train", epoch=epoch):
                run.step()
    result = record(run)
    assert (result.status, [epoch.steps for epoch in result.epochs]) == ("ok", [1])


def test_ctrl_c_leaves_no_record(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), recorder(tmp_path):
        raise KeyboardInterrupt
    assert not list(tmp_path.rglob("attempt-*"))


# --- what T is the time of ------------------------------------------------------------------------------------------


def steps_of(time_of: str, seconds: list[float], samples: int = 1) -> Steps:
    """Steps that took these seconds, in one phase without an epoch."""
    steps = Steps(CPU, TimeOf.parse(time_of))
    steps.begin(0)
    assert steps._timer is not None
    for _ in seconds:
        steps.step(1.0, samples)
    steps._timer.marks = [sum(seconds[:place]) for place in range(len(seconds) + 1)]
    steps.end(sum(seconds))
    return steps


def test_t_is_the_median_over_stretches_of_so_many_steps() -> None:
    steps = steps_of("2 steps", [9.0, 9.0, 1.0, 2.0, 1.0, 1.0, 5.0])
    outcome = steps.outcome()
    assert [epoch.train_s for epoch in outcome.epochs] == [18.0, 3.0, 2.0]
    assert outcome.step_epoch == [1, 1, 2, 2, 3, 3]
    assert steps.time(outcome).value == 2.5


def test_t_is_scaled_to_so_many_samples() -> None:
    """Two steps of 6 samples are 12, not 10."""
    steps = steps_of("10 samples", [1.0, 1.0], samples=6)
    assert steps.time(steps.outcome()).value == pytest.approx(2.0 * 10 / 12)


def test_too_few_steps_make_no_t() -> None:
    reading = steps_of("3 steps", [1.0, 1.0]).time(steps_of("3 steps", [1.0, 1.0]).outcome())
    assert (reading.value, reading.reason) == (None, "none of the stretches of 3 steps was whole")
    assert "call run.step()" in str(steps_of("3 steps", []).time(steps_of("3 steps", []).outcome()).reason)


def test_an_epoch_may_have_several_training_phases() -> None:
    steps = Steps(CPU, TimeOf.parse("epoch"))
    for epoch, wall_s in ((1, 2.0), (1, 3.0), (2, 4.0)):
        steps.begin(epoch)
        steps.step(None, 0)
        steps.end(wall_s)
    assert [(epoch.train_s, epoch.steps, epoch.loss) for epoch in steps.outcome().epochs] == [
        (5.0, 2, None),
        (4.0, 1, None),
    ]


def test_many_losses_are_read_in_order() -> None:
    steps = Steps(CPU, TimeOf.parse("200 steps"))
    steps.begin(0)
    for number in range(120):
        steps.step(None if number % 2 else torch.tensor(float(number)), 0)
    steps.end(1.0)
    assert [step.loss for step in steps.done] == [None if number % 2 else number for number in range(120)]


# --- bad use --------------------------------------------------------------------------------------------------------


def nested(run: Recorder) -> None:
    with run.phase("train", epoch=1), run.phase("validate"):
        pass


def without_epoch(run: Recorder) -> None:
    with run.phase("train"):
        pass


def unknown_phase(run: Recorder) -> None:
    with run.phase("trian", epoch=1):
        pass


def of_a_method(run: Recorder) -> None:
    with run.phase("search"):
        pass


def turned_metric(run: Recorder) -> None:
    run.metric("f1", 1, higher_is_better=True)
    run.metric("f1", 1, higher_is_better=False)


def entered_again(run: Recorder) -> None:
    with run:
        pass


MISUSE = {
    "phases cannot nest: 'validate' begins while 'train epoch 1' is open": nested,
    "needs the number of its epoch, epoch=1": without_epoch,
    "no phase is called 'trian'; did you mean 'train'?": unknown_phase,
    "no phase is called 'search' (that one is a method's own); there are load": of_a_method,
    "a step outside a training phase": lambda run: run.step(),
    "metric 'a/b': a name cannot hold a slash": lambda run: run.metric("a/b", 1, higher_is_better=True),
    "metric 'f1': its value is a number, not 'high'": lambda run: run.metric("f1", "high", higher_is_better=True),
    "metric 'f1': higher_is_better was True before": turned_metric,
    "a Recorder records one training": entered_again,
    "run.model() takes a torch module, not str": lambda run: run.model("bert"),
    "run.flops() takes a function that returns the loss": lambda run: run.flops(lambda: torch.ones(2)),
}


def test_bad_use_is_one_clear_line(tmp_path: Path) -> None:
    with recorder(tmp_path) as run:
        for message, misuse in MISUSE.items():
            with pytest.raises(UserError) as error:
                misuse(run)
            assert message in str(error.value)
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="within its 'with' block alone"):
        run.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ""}, "task '': a name cannot be empty"),
        ({"task": "recommendation"}, "give your task a name of its own"),
        ({"method": "a/b"}, "method 'a/b': a name cannot hold a slash"),
        ({"method": 3}, "method: it is a text, not 3"),
        ({"dataset": "a\nb"}, "dataset 'a"),
        ({"settings": {"model": object()}}, "settings: only names with numbers"),
        ({"options": {"lr": float("nan")}}, "options: only names with numbers"),
        ({"time_of": "an hour"}, "time_of is 'epoch', '250 steps' or '1000 samples'"),
        ({"time_of": "0 steps"}, "time_of is 'epoch'"),
        ({"seed": 1.5}, "seed: it is a whole number, not 1.5"),
        ({"device": "meta"}, "runs are recorded on 'cpu' or 'cuda', not 'meta'"),
        ({"device": "gpu"}, "device: "),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        recorder(tmp_path, **changes)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_samples_are_needed_where_t_is_their_time(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.step\(samples=...\) is needed: T is the time of 10 samples"):
        recorder(tmp_path, time_of="10 samples").step()


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"), recorder(tmp_path / "file" / "runs"):
        pytest.fail("it began")


def test_a_record_that_cannot_be_written_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "samples")

    monkeypatch.setattr("tpme.bench.recorder.recording.save_arrays", full)
    with pytest.raises(ValueError, match="it broke") as error, recorder(tmp_path):
        raise ValueError("it broke")
    assert "No space left" in error.value.__notes__[0]
    with pytest.raises(UserError, match=r"the record cannot be written: .*No space left"), recorder(tmp_path):
        pass
    assert not list(tmp_path.rglob("attempt-*"))


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{"RANK": "1", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}])
def test_of_several_processes_the_first_alone_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with recorder(tmp_path) as run:
        model = small()
        run.model(model)
        run.flops(lambda: cross_entropy(model(INPUTS), LABELS))
        train(run, model, epochs=1)
    assert (run.path, list(tmp_path.iterdir())) == (None, [])


def test_the_number_of_processes_is_part_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with recorder(tmp_path) as run:
        train(run, small(), epochs=1)
    result = record(run)
    assert result.environment is not None
    assert result.environment.device_key.endswith(", 4 processes")
    assert "first-process" in {flag.code for flag in result.flags}


def test_the_package_imports_no_torch_until_a_recorder_is_asked_for() -> None:
    code = "import sys, tpme.bench; assert 'torch' not in sys.modules and not hasattr(tpme.bench, 'Recoder')"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what the benchmark of its cost computes --------------------------------------------------------------------------


def test_the_share_that_recording_adds_is_found_in_noise() -> None:
    """Of made-up steps: a share of 2 %, in drifting noise that is larger than it, with a slow first step."""
    generator = np.random.default_rng(0)
    steps = np.repeat(np.linspace(1.0, 1.5, 28), 12).reshape(28, 12) * generator.lognormal(0, 0.01, (28, 12))
    steps[:, 0] *= 3
    steps[:, 1::2] *= 1.1  # what is slow about a place is none of the Recorder's
    recorded = np.add.outer(np.arange(28), np.arange(12)) % 2 == 0
    for share in (0.0, 0.02):
        found, low, high = added(np.where(recorded, 1 + share, 1) * steps)
        assert low < found < high
        assert abs(found - share) < 0.004
