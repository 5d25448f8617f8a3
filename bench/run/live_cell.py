"""A cell that also reports its epochs: what ``tpme run --log`` starts in place of ``tpme.bench.run.cell``.

The hook is here and not in the loop, so that without it nothing differs: the cell runs the same files and has the same
code version. With it, one line goes to the standard output after an epoch was trained, validated and ranked, before
the next one begins: between two phases, hence never within a training phase. The launcher reads it
(``tpme.bench.run.live``); nothing that logs is loaded here.
"""

from __future__ import annotations

import contextlib
import json
import os

from tpme.bench.lifetimes import die_with_launcher

if __name__ == "__main__":
    die_with_launcher()  # at once: torch takes seconds to load

import torch

from tpme.bench.quantities import memory_reading
from tpme.bench.run import cell
from tpme.bench.train.loop import Trainer


def epoch_line(trainer: Trainer) -> str:
    """The last epoch of ``trainer`` as JSON: its number and its values, under the names that ``tpme export`` uses.

    ``memory_bytes`` is M as of now, ``peak_bytes`` the peak over all phases so far, by the reading of M.
    """
    epoch, device = trainer.outcome.epochs[-1], trainer.device.type
    training = trainer.phases.training_memory(trainer.outcome.first_phase)
    held = memory_reading("memory_bytes", training, device).value
    peaks = (memory_reading("memory_bytes", phase.memory, device).value for phase in trainer.phases.phases)
    memory = {"memory_bytes": held, "peak_bytes": max(filter(None, peaks), default=None)}
    values = {
        "epoch_train_s": epoch.train_s,
        "epoch_loss": epoch.loss,
        **{f"epoch_losses/{name}": value for name, value in epoch.losses.items()},
        "epoch_valid_recall_10": epoch.valid_recall_10,
        "epoch_valid_ndcg_10": epoch.valid_ndcg_10,
        **{name: value for name, value in memory.items() if value is not None},
    }
    return json.dumps({"epoch": epoch.index, "values": values})


def main() -> None:
    """Run the cell of the job file that is the first argument, and write a line after each of its epochs."""
    output = os.dup(1)  # the cell turns 1 itself into its log
    recorded_epoch = Trainer._recorded_epoch

    def reported_epoch(trainer: Trainer, optimizer: torch.optim.Optimizer, stage: str) -> bool:
        improved = recorded_epoch(trainer, optimizer, stage)
        with contextlib.suppress(BrokenPipeError):  # the launcher is gone: the next progress event ends the cell
            os.write(output, f"{epoch_line(trainer)}\n".encode())
        return improved

    Trainer._recorded_epoch = reported_epoch  # type: ignore[assignment, method-assign]
    cell.main()


if __name__ == "__main__":
    main()
