"""Records what the Trainer of transformers does, and those of TRL, which derive from it.

The training phase of an epoch is closed while the Trainer evaluates and saves. What it logs counts as training, as
every step may log. A step is one optimiser step, however many batches it accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tpme.bench.errors import UserError
from tpme.bench.recorder.timeline import Recording, Timeline


class TrainerRecorder(TrainerCallback):  # type: ignore[misc]
    """Give it to a Trainer within the Recorder's ``with`` block: ``callbacks=[run.trainer_callback()]``.

    Args:
        run: the Recorder. metrics: name of each evaluated quality -> whether higher is better.
    """

    def __init__(self, run: Recording, metrics: Mapping[str, bool]) -> None:
        self._run, self._metrics = run, dict(metrics)
        self._trained = self._in_epoch = False
        self._epoch = 0

    @property
    def _timeline(self) -> Timeline | None:
        return self._run.timeline

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over seed and model."""
        if self._timeline is None:
            return
        if self._trained:
            raise UserError("a Recorder records one training: make another one, with its callback, for the next")
        self._trained = True
        if self._run.seed is None:
            self._run.seed = args.seed
        if (model := kwargs.get("model")) is not None:
            self._run.model(model)
        self._samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.global_step:
            self._run.flag("resumed", f"the training was resumed after step {state.global_step:,}")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin the training phase of the epoch."""
        begun = state.epoch or 0.0
        self._epoch, self._in_epoch = math.floor(begun + 1e-6) + 1, True
        if timeline := self._timeline:
            if begun + 1 - self._epoch > 1e-6:
                timeline.steps.partial[self._epoch] = "the training was resumed within it"
            timeline.begin("train", self._epoch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step, and close the training phase where evaluation or saving follows."""
        if (timeline := self._timeline) is None:
            return
        timeline.step(None, self._samples)
        self._pause(control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the training phase where an evaluation was not announced when the step ended."""
        if self._training():
            self._run.flag("mixed-phase", "the first batch of an evaluation that a callback started counts as training")
            self._switch("validate")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Record the qualities and go on with what follows."""
        if self._timeline is None:
            return
        for name, better in self._metrics.items():
            if metrics and name in metrics:
                self._run.metric(name, metrics[name], higher_is_better=better)
        if self._trained and self._timeline.open == "validate":
            # With the strategy "best" the Trainer decides after this call whether it saves.
            if control.should_save or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
                self._switch("export")
            else:
                self._resume()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on training."""
        if self._training():
            self._run.flag("mixed-phase", "saving that a callback started counts as training")
        elif self._timeline is not None and self._timeline.open == "export":
            self._resume()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on training where nothing was saved after all."""
        if self._timeline is not None and self._timeline.open != "train":
            self._resume()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the training loss that is logged."""
        if self._timeline is not None and logs and "loss" in logs:
            self._timeline.steps.losses[self._epoch].append(float(logs["loss"]))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the training phase; the epoch is whole unless the training stops within it."""
        self._in_epoch = False
        if (timeline := self._timeline) is None:
            return
        if (state.epoch or 0.0) < self._epoch - 1e-6:
            timeline.steps.partial[self._epoch] = f"training ended at epoch {state.epoch or 0.0:.2f}"
        if timeline.open not in (None, "train"):
            timeline.end()
        if timeline.open == "train" and not self._pause(control):
            timeline.end()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close what is open."""
        self._in_epoch = False
        if timeline := self._timeline:
            timeline.end()

    def _training(self) -> bool:
        return self._trained and self._timeline is not None and self._timeline.open == "train"

    def _pause(self, control: TrainerControl) -> bool:
        """Close the training phase where evaluation or saving follows; returns whether one does."""
        if control.should_evaluate or control.should_save:
            self._switch("validate" if control.should_evaluate else "export")
            return True
        return False

    def _switch(self, kind: str) -> None:
        assert self._timeline is not None
        self._timeline.end()
        self._timeline.begin(kind, name=f"epoch {self._epoch}")

    def _resume(self) -> None:
        """Open the training phase again, between epochs none."""
        assert self._timeline is not None
        self._timeline.end()
        if self._in_epoch:
            self._timeline.begin("train", self._epoch)
