"""What a Recorder adds to a step of transformers' Trainer: its callback and its sampler, against steps without them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paired_steps import added
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from tpme.bench import Recorder
from tpme.bench.measure.clock import now
from tpme.bench.recorder.trainer_callback import TrainerRecorder

MOST = 0.01
"""The promise: of a training step."""
EPOCHS, STEPS, BATCH, LENGTH = 16, 12, 8, 64


class InTurns(TrainerRecorder):
    """Records every second step, in the next epoch the others; between them the sampler's process is stopped.

    Its own clock times what the callback does, too.
    """

    def __init__(self, run: Recorder, device: str) -> None:
        super().__init__(run, {})
        assert run._log._sampler is not None
        self.sampler, self.device, self.seconds = run._log._sampler._running(), device, list[float]()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_epoch_begin(args, state, control, **kwargs)
        self.take_turn()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.records:
            super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.records:
            super().on_step_end(args, state, control, **kwargs)
        self.seconds.append(now(self.device) - self.since)
        self.take_turn()

    def take_turn(self) -> None:
        epoch, step = divmod(len(self.seconds), STEPS)
        self.records = (epoch + step) % 2 == 0
        self.sampler.send_signal(signal.SIGCONT if self.records else signal.SIGSTOP)
        self.since = now(self.device)


@contextmanager
def recording(folder: Path, device: str) -> Iterator[Recorder]:
    with Recorder(task="cost", method="fft", folder=folder, device=device) as run:
        try:
            yield run
        finally:
            assert run._log._sampler is not None
            run._log._sampler._running().send_signal(signal.SIGCONT)


def step_times(folder: Path, device: str) -> np.ndarray[Any, Any]:
    """Seconds of the steps of every epoch but the first two: (EPOCHS - 2, STEPS)."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=1000)
    )
    rows = [{"input_ids": torch.randint(0, 1000, (LENGTH,)), "labels": row % 2} for row in range(STEPS * BATCH)]
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=device == "cpu",
    )  # fmt: skip
    with recording(folder, device) as run:
        Trainer(model, arguments, train_dataset=rows, callbacks=[clock := InTurns(run, device)]).train()  # type: ignore[arg-type]
    return np.array(clock.seconds).reshape(EPOCHS, STEPS)[2:]


@pytest.mark.slow
def test_a_recorder_adds_at_most_one_percent_to_a_step(
    tmp_path: Path, device: torch.device, benchmark: Any, note: Any, say: Any
) -> None:
    runs = [benchmark.pedantic(step_times, args=(tmp_path / "1", device.type), rounds=1)]
    for number in (2, 3, 4, 5):  # until noise leaves no doubt, four runs at most; all of them count
        steps = np.concatenate(runs)
        share, low, high = added(steps)
        say(f"recorded steps of the Trainer: {share:+.2%} [{low:+.2%}, {high:+.2%}] ({1e3 * np.median(steps):.3g} ms)")
        if not low <= MOST <= high or number == 5:
            break
        runs.append(step_times(tmp_path / str(number), device.type))
    note(
        "what a Recorder adds to a step of transformers' Trainer", "at most 1%", f"{share:.2%} [{low:.2%}, {high:.2%}]"
    )
    assert share <= MOST
