"""Trainings of transformers' Trainer as records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from tpme.bench import Recorder
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, read_result
from tpme.bench.side_files import load_samples

pytestmark = pytest.mark.slow

ROWS = 24


class Tiny(nn.Module):
    """A classifier as the Trainer wants it: a dict with a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)
        self.on_call: Callable[[], None] = lambda: None

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.on_call()
        logits = self.head(self.frozen(inputs))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"inputs": torch.randn(4), "labels": torch.tensor(row % 2)} for row in range(ROWS)]


def accuracy(evaluated: Any) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


def train(
    folder: Path,
    run: Recorder,
    model: Tiny | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    metrics: dict[str, bool] | None = None,
    **arguments: Any,
) -> Trainer:
    """Train on 24 rows, 4 a step, so 6 steps an epoch."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 3, "report_to": [], "use_cpu": True, "seed": 7,
        "save_strategy": "no", "logging_steps": 2, "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(
        model=model or Tiny(),
        args=TrainingArguments(str(folder / "out"), **(settings | arguments)),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=accuracy,
        callbacks=[run.trainer_callback(metrics), *callbacks],
    )
    trainer.train()
    return trainer


def recorded(folder: Path, time_of: str = "epoch", **how: Any) -> CellResult:
    with Recorder(task="toy", method="head", folder=folder / "run", device="cpu", version="v", time_of=time_of) as run:
        train(folder, run, **how)
    assert run.path is not None
    return read_result(run.path)


def kinds(result: CellResult) -> list[str]:
    return [phase.kind for phase in result.phases if phase.kind != "other"]


def test_epochs_are_training_alone(tmp_path: Path) -> None:
    result = recorded(tmp_path, eval_strategy="epoch", save_strategy="epoch", metrics={"eval_accuracy": True})
    assert kinds(result) == ["load", *["train", "validate", "export"] * 3, "count"]
    assert [(epoch.index, epoch.steps) for epoch in result.epochs] == [(1, 6), (2, 6), (3, 6)]
    training = [phase.wall_s for phase in result.phases if phase.kind == "train"]
    assert [epoch.train_s for epoch in result.epochs] == training
    assert all(epoch.loss is not None and "eval_accuracy" in epoch.metrics for epoch in result.epochs)
    assert result.metrics["eval_accuracy"].value.value == result.epochs[-1].metrics["eval_accuracy"]
    assert (result.status, result.cell.seed, result.flags[0].code) == ("ok", 7, "cpu-memory")
    assert result.parameters is not None
    assert (result.parameters.trainable, result.parameters.total) == (10, 30)


def test_evaluation_and_saving_within_an_epoch_are_not_training(tmp_path: Path) -> None:
    result = recorded(
        tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, num_train_epochs=1
    )
    assert kinds(result) == ["load", *["train", "validate", "export"] * 2, "train", "count"]
    [epoch] = result.epochs
    assert epoch.steps == 6
    assert epoch.train_s == sum(phase.wall_s for phase in result.phases if phase.kind == "train")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4}, ["train", "validate", "train"]),
        ({"save_strategy": "steps", "save_steps": 4}, ["train", "export", "train"]),
        (
            {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "best", "metric_for_best_model": "eval_loss"},
            ["train", "validate", "export", "train"],
        ),
    ],
)
def test_training_goes_on_after_it(tmp_path: Path, arguments: dict[str, Any], expected: list[str]) -> None:
    result = recorded(tmp_path, num_train_epochs=1, **arguments)
    assert [kind for kind in kinds(result) if kind not in ("load", "count")][: len(expected)] == expected
    assert [epoch.steps for epoch in result.epochs] == [6]


def test_evaluating_takes_no_training_time(tmp_path: Path) -> None:
    """The work of an evaluation is seen by the phase that is open while the model runs in eval mode."""
    seen: dict[bool, set[str | None]] = {True: set(), False: set()}
    model = Tiny()
    with Recorder(task="toy", method="head", folder=tmp_path / "run", device="cpu") as run:

        def look() -> None:
            assert run.timeline is not None
            seen[model.training].add(run.timeline.open)

        model.on_call = look
        train(tmp_path, run, model, eval_strategy="steps", eval_steps=2, num_train_epochs=2)
    assert seen == {True: {"train"}, False: {"validate"}}


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    result = recorded(tmp_path, gradient_accumulation_steps=3, num_train_epochs=2)
    assert [epoch.steps for epoch in result.epochs] == [2, 2]
    [samples] = tmp_path.rglob("*.samples.npz")
    assert load_samples(samples).step_epoch.tolist() == [1, 1, 2, 2]


def test_t_is_the_time_of_steps_or_samples(tmp_path: Path) -> None:
    """12 samples are 3 steps of 4."""
    for time_of, folder in (("3 steps", tmp_path / "steps"), ("12 samples", tmp_path / "samples")):
        result = recorded(folder, time_of, max_steps=13)
        assert (result.time_of, [epoch.steps for epoch in result.epochs]) == (time_of, [3, 3, 3, 3])
        assert result.epoch_time_s.value is not None


def test_an_epoch_that_training_leaves_is_not_counted(tmp_path: Path) -> None:
    result = recorded(tmp_path, max_steps=15, num_train_epochs=3)
    assert [epoch.steps for epoch in result.epochs] == [6, 6]
    short = recorded(tmp_path / "short", max_steps=3)
    assert (short.status, short.epoch_time_s.value) == ("ok", None)
    assert "training ended at epoch 0.50; time_of='250 steps' measures such a training" in str(
        short.epoch_time_s.reason
    )


def test_a_resumed_training_says_so(tmp_path: Path) -> None:
    recorded(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    with Recorder(task="toy", method="head", folder=tmp_path / "run", device="cpu") as run:
        arguments = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(Tiny(), arguments, train_dataset=rows(), callbacks=[run.trainer_callback()]).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3")
        )
    assert run.path is not None
    result = read_result(run.path)
    assert [epoch.steps for epoch in result.epochs] == [6]
    assert "resumed" in {flag.code for flag in result.flags}


def test_a_callback_that_stops_early_leaves_whole_epochs(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    result = recorded(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, num_train_epochs=5,
        callbacks=(stopping,), metric_for_best_model="eval_loss",
    )  # fmt: skip
    assert [epoch.steps for epoch in result.epochs] == [6, 6]


def test_an_evaluation_that_another_callback_starts_is_told(tmp_path: Path) -> None:
    class Sudden(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_evaluate = state.global_step == 2

    result = recorded(tmp_path, num_train_epochs=1, callbacks=(Sudden(),))
    assert kinds(result)[:4] == ["load", "train", "validate", "train"]
    assert [flag.message for flag in result.flags if flag.code == "mixed-phase"] == [
        "the first batch of an evaluation that a callback started counts as training"
    ]


def test_an_error_within_a_step_is_a_row(tmp_path: Path) -> None:
    model, calls = Tiny(), list[int]()

    def fail() -> None:
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    model.on_call = fail
    run = Recorder(task="toy", method="head", folder=tmp_path / "run", device="cpu")
    with pytest.raises(torch.OutOfMemoryError), run:
        train(tmp_path, run, model)
    assert run.path is not None
    result = read_result(run.path)
    assert result.failure is not None
    assert (result.status, result.failure.phase, result.failure.epoch, result.failure.step) == (
        "oom",
        "train epoch 2",
        2,
        3,
    )
    assert [epoch.index for epoch in result.epochs] == [1]


def test_a_loss_that_is_not_a_number_is_a_row_although_the_trainer_hides_it(tmp_path: Path) -> None:
    """It logs the mean of the losses before it in its place."""
    model, calls = Tiny(), list[int]()

    def break_down() -> None:
        calls.append(1)
        if len(calls) == 9:
            torch.nn.init.constant_(model.head.bias, torch.nan)

    model.on_call = break_down
    result = recorded(tmp_path, model=model)
    assert result.failure is not None
    assert (result.status, result.failure.message) == (
        "diverged", "parameter 'head.weight' is not finite after training; try a lower learning rate",
    )  # fmt: skip


def test_a_second_training_is_refused(tmp_path: Path) -> None:
    with Recorder(task="toy", method="head", folder=tmp_path / "run", device="cpu") as run:
        trainer = train(tmp_path, run, num_train_epochs=1)
        with pytest.raises(UserError, match="a Recorder records one training"):
            trainer.train()


def test_processes_that_do_not_record_train_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpme.bench.recorder.recording.rank", lambda: 1)
    with Recorder(task="toy", method="head", folder=tmp_path / "run", device="cpu") as run:
        trainer = train(tmp_path, run, eval_strategy="epoch", num_train_epochs=1)
    assert (trainer.state.global_step, run.path) == (6, None)


@pytest.mark.slow
def test_trl_trains_with_the_same_callback(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = Dataset.from_dict({"input_ids": [list(range(8))] * ROWS, "labels": [list(range(8))] * ROWS})
    arguments = SFTConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=False, eos_token=None,
    )  # fmt: skip
    with Recorder(task="toy", method="sft", folder=tmp_path / "run", device="cpu") as run:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = {"<eos>": 0} | {f"w{number}": number for number in range(1, 16)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), eos_token="<eos>", pad_token="<eos>"
        )
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=16))
        SFTTrainer(
            model, arguments, train_dataset=tokens, processing_class=tokenizer, callbacks=[run.trainer_callback()]
        ).train()
    assert run.path is not None
    assert [epoch.steps for epoch in read_result(run.path).epochs] == [6, 6]
