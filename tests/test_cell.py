"""One cell: every way it can end leaves a record of all that is known."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.bench.lifetimes import MARK, Launcher
from tpme.bench.record import CellResult, read_result
from tpme.bench.train.ending import TimeLimitReached, bytes_requested, status_of
from tpme.bench.workers import parse_progress

RunCell = Callable[..., CellResult]


def ending(result: CellResult) -> tuple[str, str, str]:
    assert result.failure is not None
    return result.status, result.failure.phase, result.failure.message


# --- how a cell ends ------------------------------------------------------------------------------------------------


def test_an_error_names_its_phase_and_its_kind(run_cell: RunCell) -> None:
    result = run_cell("def adapt(self, model, schedule): raise KeyError('query')")
    assert ending(result) == ("error", "adapt", "KeyError: 'query'")
    assert (result.failure.epoch, result.failure.step, result.failure.bytes_requested) == (None, None, None)
    assert result.epoch_time_s.value is None
    assert result.parameters is None
    assert result.dataset is not None
    assert result.text_encoder is not None
    assert [phase.kind for phase in result.phases] == ["load", "load", "load", "adapt"]
    # Arithmetic that fails in a method is no divergence; its kind is recorded.
    result = run_cell("def before_step(self, state): 1 / 0")
    assert ending(result) == ("error", "train epoch 1", "ZeroDivisionError: division by zero")
    assert (result.failure.epoch, result.failure.step) == (1, 1)


def test_a_user_error_is_recorded_as_it_is(run_cell: RunCell) -> None:
    result = run_cell(
        """
        def before_training(self, context):
            from tpme.bench.errors import UserError
            raise UserError("needs more users")
        """
    )
    assert ending(result) == ("error", "estimate", "needs more users")


def test_a_loss_that_is_not_finite_is_recorded_with_its_step(run_cell: RunCell) -> None:
    body = """
    def losses(self, outputs):
        self.count = getattr(self, "count", 0) + 1
        loss = outputs["task"].loss
        return {"task": loss * float("nan") if self.count == 7 else loss}
    """
    result = run_cell(body, training={"epochs": 3, "users_per_batch": 12, "max_steps_per_epoch": None})
    message = "the loss is not finite at step 2 of epoch 2; try a lower learning rate"
    assert ending(result) == ("diverged", "train epoch 2", message)
    assert (result.failure.epoch, result.failure.step) == (2, 2)
    # What is known of the first epoch is kept.
    assert [epoch.index for epoch in result.epochs] == [1]
    assert result.epoch_time_s.value == pytest.approx(result.epochs[0].train_s)
    assert "ranks" not in result.files


def test_item_vectors_that_are_not_finite_are_a_divergence(run_cell: RunCell) -> None:
    result = run_cell(
        """
        def on_epoch_end(self, state):
            with torch.no_grad():
                next(state.model.sequence.parameters()).fill_(float("inf"))
        """
    )
    assert result.status == "diverged"
    assert result.failure.phase == "validate epoch 1"
    assert "are not finite; the model diverged" in result.failure.message
    assert (result.failure.epoch, result.failure.step) == (1, None)


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        ('torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")', 2 * 2**30),
        ("MemoryError()", None),
        ('RuntimeError("[enforce fail] can\'t allocate memory: you tried to allocate 4096 bytes.")', 4096),
        ('RuntimeError("CUDA error: out of memory")', None),
        ('RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")', None),
    ],
)
def test_out_of_memory_is_recorded_with_its_request(run_cell: RunCell, error: str, requested: int | None) -> None:
    body = f"""
    def after_backward(self, state):
        if state.step == 3:
            raise {error}
    """
    result = run_cell(body, training={"epochs": 2, "max_steps_per_epoch": 2})
    assert result.status == "oom"
    assert result.failure.phase == "train epoch 2"
    assert (result.failure.epoch, result.failure.step) == (2, 2)
    assert result.failure.bytes_requested == requested
    assert len(result.epochs) == 1


def test_a_real_allocation_that_fails(run_cell: RunCell) -> None:
    result = run_cell("def adapt(self, model, schedule): torch.empty(2**55, dtype=torch.uint8)")
    assert (result.status, result.failure.bytes_requested) == ("oom", 2**55)


def test_out_of_memory_leaves_a_lower_bound_of_what_would_have_been_needed(run_cell: RunCell) -> None:
    """In its very first step, when no epoch has an account of its memory yet."""
    result = run_cell(
        """
        def before_step(self, state):
            self.held = torch.ones(2**24)
            torch.empty(2**55, dtype=torch.uint8)
        """
    )
    assert (result.status, result.failure.epoch, result.failure.step) == ("oom", 1, 1)
    failed = result.phases[-2]  # the counters come last
    assert failed.kind == "train"
    assert failed.memory.host_rss_bytes.value >= 4 * 2**24


def test_other_runtime_errors_are_errors() -> None:
    assert status_of(RuntimeError("shapes differ")) == "error"
    assert status_of(TimeLimitReached()) == "timeout"
    assert bytes_requested("Tried to allocate 1.50 MiB") == 3 * 2**19
    assert bytes_requested("allocate memory for 3 heads") is None


def test_a_long_message_is_cut_to_one_line(run_cell: RunCell) -> None:
    result = run_cell("def adapt(self, model, schedule): raise ValueError('a\\n' * 1000)")
    assert result.failure.message.startswith("ValueError: a a a")
    assert len(result.failure.message) == 400
    assert result.failure.message.endswith(" ...")


def test_a_counter_that_is_no_number_is_missing_with_a_reason(run_cell: RunCell) -> None:
    result = run_cell("def report(self, model): return {'kept': 3, 'ratio': float('nan')}")
    assert result.status == "ok"
    assert result.counters["kept"].value == 3
    assert (result.counters["ratio"].value, result.counters["ratio"].reason) == (None, "it is nan")
    assert CellResult.model_validate_json(result.model_dump_json()) == result


# --- what it checks before it trains --------------------------------------------------------------------------------


def test_data_or_encoders_that_changed_since_the_matrix_was_read(
    world: Any, harness: ModuleType, tmp_path: Path
) -> None:
    for folder in (world.text, world.image, world.data):
        shutil.copytree(folder, tmp_path / folder.name)
    moved = harness.World(tmp_path / "text", tmp_path / "image", tmp_path / "data", world.store)
    matrix = moved.matrix(["frozen"], modalities=["text"])
    [job] = moved.jobs(matrix, tmp_path)
    other = job.cell.model_copy(update={"dataset_fingerprint": "0" * 64})
    status, _, message = ending(moved.tell(matrix, tmp_path / "cell", cell=other))
    assert status == "error"
    assert message == f"{moved.data}: changed since the matrix was read; run the matrix again"
    with (moved.text / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    status, _, message = ending(moved.tell(matrix, tmp_path / "cell", cell=job.cell))
    assert status == "error"
    assert message == f"encoder '{moved.text}': changed since the matrix was read; run the matrix again"


def test_images_of_another_size(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    tiny.encoder("image", image_size=48).save_pretrained(tmp_path / "image")
    matrix = world.matrix(["frozen"], encoders=[{"image": {"source": str(tmp_path / "image")}}], modalities=["image"])
    with pytest.raises(UserError, match=r"its images are 32 pixels wide, but the encoder .* reads 48"):
        world.tell(matrix, tmp_path / "cell")


def test_random_weights_and_useless_checkpointing_are_flagged(world: Any, tmp_path: Path) -> None:
    specs = {"text": {"source": str(world.text), "weights": "random"}, "image": {"source": str(world.image)}}
    matrix = world.matrix(["frozen"], encoders=[specs], training={"activation_checkpointing": True})
    flags = {flag.code: flag.message for flag in world.tell(matrix, tmp_path / "cell").flags}
    assert flags["random-weights"].startswith("text encoder with random weights")
    assert flags["no-checkpointing"].startswith("nothing to checkpoint")


# --- its process ----------------------------------------------------------------------------------------------------


def start(world: Any, harness: ModuleType, folder: Path, left_s: float = 100.0) -> tuple[subprocess.Popen[str], Path]:
    """A cell process whose method waits, while it adapts, for the file ``go``; and its record.

    ``left_s``: of its time, as its launcher told it.
    """
    body = f"""
    def adapt(self, model, schedule):
        import os, time
        if next(model.parameters()).is_meta:  # the launcher only looks at the structure
            return
        print("words of a library")
        os.write(1, b"and of its C code\\n")
        open({str(folder / "ready")!r}, "w").write("yes")
        try:
            while not os.path.exists({str(folder / "go")!r}):
                time.sleep(0.1)
        except Exception:
            pass
    """
    harness.write_method(folder / "methods", "waiting", body)
    job = world.job(world.matrix(["waiting"]), folder, (folder / "methods",), time_limit_s=12.5)
    (folder / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-P", "-m", "tpme.bench.run.cell", str(folder / "job.json")]
    told = os.environ | {MARK: Launcher.here(time.monotonic() + left_s, None).mark}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=told)
    harness.wait_for(folder / "ready")
    return process, job.file(".json")


@pytest.fixture(scope="module")
def stopped(world: Any, harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, str]:
    """Record, exit code and output of a cell that was stopped at its time limit."""
    process, record = start(world, harness, tmp_path_factory.mktemp("stopped"), left_s=0.0)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    return record, process.returncode, out, err


def test_a_cell_that_is_out_of_time_writes_its_own_record(stopped: tuple[Path, int, str, str]) -> None:
    path, code, _, err = stopped
    result = read_result(path)
    assert code == 0, err
    message = "took longer than its time limit of 12.5 s; raise time_limit_s or --time-limit"
    assert ending(result) == ("timeout", "adapt", message)
    assert result.time_limit_s == 12.5
    assert result.text_encoder is not None
    assert result.environment is not None
    with np.load(path.parent / result.files["samples"]) as samples:
        assert len(samples["sample_t_s"]) > 5
    assert "Traceback" not in err


def test_a_signal_of_somebody_else_is_no_timeout(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    """It has no record of its own: the launcher's says what ended it, and the cell is repeated."""
    process, record = start(world, harness, tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert not record.exists()


def test_only_progress_goes_to_the_standard_output(stopped: tuple[Path, int, str, str]) -> None:
    _, _, out, err = stopped
    assert len(out.splitlines()) >= 1
    assert all(parse_progress(line) is not None for line in out.splitlines())
    assert "words of a library" in err
    assert "and of its C code" in err


def test_a_cell_whose_launcher_is_gone_ends(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    """Its progress has no reader: the next event ends it, without a record."""
    process, record = start(world, harness, tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    (tmp_path / "go").touch()
    assert process.wait(timeout=60) == 1
    assert not record.exists()
