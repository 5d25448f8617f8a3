"""Trainings of Lightning as records."""

from __future__ import annotations

import builtins
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tpme.bench import Recorder
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, read_result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch", reason="Lightning is not installed (extra 'lightning')")


def module_of(lightning: Any, fail_at: int = 0) -> Any:
    """A module that logs its accuracy and, if asked to, breaks in one of its training steps."""

    class Small(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.head, self.calls, self.seen = nn.Linear(4, 2), 0, set[tuple[bool, str | None]]()

        def training_step(self, batch: Any, _: int) -> Tensor:
            self.calls += 1
            self.look()
            if self.calls == fail_at:
                raise ValueError("it broke")
            return nn.functional.cross_entropy(self.head(batch), torch.zeros(len(batch), dtype=torch.long))

        def validation_step(self, batch: Any, _: int) -> None:
            self.look()
            self.log("valid_accuracy", float((self.head(batch).argmax(1) == 0).float().mean()))

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            self.saved = self.run.timeline.open

        def look(self) -> None:
            timeline = self.run.timeline
            if timeline is not None and not self.trainer.sanity_checking:
                self.seen.add((self.training, timeline.open))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Small()


def recorded(lightning: Any, folder: Path, fail_at: int = 0, **arguments: Any) -> tuple[CellResult, Any]:
    """Train on 24 rows, 4 a batch, so 6 batches an epoch."""
    loader = DataLoader(torch.randn(24, 4), batch_size=4)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 3, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
    }  # fmt: skip
    module = module_of(lightning, fail_at)
    run = Recorder(task="toy", method="head", folder=folder / "run", device="cpu", version="v", seed=1)
    module.run = run
    with pytest.raises(ValueError, match="it broke") if fail_at else nullcontext(), run:
        trainer = lightning.Trainer(
            callbacks=[run.lightning_callback({"valid_accuracy": True})], **(settings | arguments)
        )
        trainer.fit(module, loader, loader)
    assert run.path is not None
    return read_result(run.path), module


def test_epochs_are_training_alone(lightning: Any, tmp_path: Path) -> None:
    result, module = recorded(lightning, tmp_path, enable_checkpointing=True, val_check_interval=3)
    assert [(epoch.index, epoch.steps) for epoch in result.epochs] == [(1, 6), (2, 6), (3, 6)]
    assert all(epoch.loss is not None and "valid_accuracy" in epoch.metrics for epoch in result.epochs)
    assert (result.status, result.metrics["valid_accuracy"].higher_is_better) == ("ok", True)
    assert module.seen == {(True, "train"), (False, "validate")}
    assert module.saved == "export"
    assert {"train", "validate", "export"} <= {phase.kind for phase in result.phases}
    assert result.parameters is not None
    assert result.parameters.trainable == 10


def test_accumulated_batches_are_one_step(lightning: Any, tmp_path: Path) -> None:
    result, _ = recorded(lightning, tmp_path, accumulate_grad_batches=3, max_epochs=1)
    assert [epoch.steps for epoch in result.epochs] == [2]


def test_an_epoch_that_training_leaves_is_not_counted(lightning: Any, tmp_path: Path) -> None:
    result, _ = recorded(lightning, tmp_path, max_steps=9)
    assert [epoch.steps for epoch in result.epochs] == [6]


def test_an_error_within_a_step_is_a_row(lightning: Any, tmp_path: Path) -> None:
    result, _ = recorded(lightning, tmp_path, fail_at=9)
    assert result.failure is not None
    assert (result.status, result.failure.epoch, result.failure.step) == ("error", 2, 3)
    assert result.failure.message == "ValueError: it broke"


def test_without_lightning_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, "tpme.bench.recorder.lightning_callback", raising=False)
    with pytest.raises(UserError, match="needs Lightning: pip install"):
        Recorder(task="toy", method="head", device="cpu").lightning_callback({})
