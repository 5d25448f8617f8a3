"""Full fine-tuning: every weight of both encoders trains."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule, TaskShape, fusion_parameters


class FullFineTuning(Method):
    """All encoder parameters train: the reference for all other rows.

    ``W <- W - lr * Adam(dL/dW)`` for every weight of both encoders.

    Trains: everything: 194,897,216 at BERT-base + ViT-B/16 with the recommender's own parts (no pooler).
    Saves: nothing; the most time, memory and stored size of all methods.
    Source: the usual practice; here with the optimiser, batch and protocol of IISAN (Fu et al., SIGIR 2024).
    """

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Make both encoders trainable."""
        model.encoders.requires_grad_(True)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """The size of the encoders."""
        encoders = sum(value.numel() for view in views.values() for value in view.module.parameters())
        return encoders + fusion_parameters(task)
