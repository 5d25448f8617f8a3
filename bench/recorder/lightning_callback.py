"""Records what Lightning's Trainer does.

The training phase of an epoch is closed while Lightning validates and saves. What it logs counts as training. A step
is one optimiser step, however many batches it accumulates.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tpme.bench.errors import UserError, missing_extra
from tpme.bench.recorder.timeline import Recording, Timeline

try:
    if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
        from pytorch_lightning import Callback
    else:
        from lightning.pytorch import Callback
except ImportError:
    raise missing_extra("lightning_callback()", "Lightning", "lightning") from None


class LightningRecorder(Callback):  # type: ignore[misc]
    """Give it to a Trainer within the Recorder's ``with`` block: ``callbacks=[run.lightning_callback(...)]``.

    Args:
        run: the Recorder. metrics: name of each logged quality -> whether higher is better.
    """

    def __init__(self, run: Recording, metrics: Mapping[str, bool]) -> None:
        self._run, self._metrics = run, dict(metrics)
        self._trained = self._in_epoch = False
        self._epoch = self._batches = self._steps = 0

    @property
    def _timeline(self) -> Timeline | None:
        return self._run.timeline

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over seed and model."""
        if self._timeline is None:
            return
        if self._trained:
            raise UserError("a Recorder records one training: make another one, with its callback, for the next")
        self._trained = True
        self._run.model(pl_module)
        self._steps = trainer.global_step

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the training phase of the epoch."""
        self._epoch, self._batches, self._in_epoch = trainer.current_epoch + 1, 0, True
        if timeline := self._timeline:
            timeline.begin("train", self._epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Go on training after what was saved."""
        self._resume()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, where the batch ended one."""
        self._batches += 1
        if (timeline := self._timeline) is None or timeline.open != "train":
            return
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            timeline.step(loss, 0)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Close the training phase."""
        self._switch("validate")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the qualities and go on training."""
        if self._timeline is None or trainer.sanity_checking:
            return
        self._record(trainer)
        self._resume()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Close the training phase: what follows is written to the disk."""
        self._switch("export")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the training phase; the epoch is whole unless the training stops within it."""
        self._in_epoch = False
        if (timeline := self._timeline) is None:
            return
        if self._batches < trainer.num_training_batches:
            timeline.steps.partial[self._epoch] = f"training ended after {self._batches} batches of an epoch"
        timeline.end()
        self._record(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close what is open."""
        if timeline := self._timeline:
            timeline.end()

    def _record(self, trainer: Any) -> None:
        for name, better in self._metrics.items():
            if name in trainer.callback_metrics:
                self._run.metric(name, trainer.callback_metrics[name], higher_is_better=better)

    def _switch(self, kind: str) -> None:
        if self._timeline is not None and self._in_epoch and self._timeline.open == "train":
            self._timeline.end()
            self._timeline.begin(kind, name=f"epoch {self._epoch}")

    def _resume(self) -> None:
        if self._timeline is not None and self._in_epoch and self._timeline.open != "train":
            self._timeline.end()
            self._timeline.begin("train", self._epoch)
