"""Full fine-tuning: every weight of both encoders trains."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule, TaskShape, fusion_parameters


class FullFineTuning(Method):
    """Trains every weight of both encoders; the reference for all other rows.

    ``W <- W - lr * Adam(dL/dW)`` for every weight of both encoders, without the poolers, which nothing reads.

    Trains: all weights: 108,891,648 in BERT-base, 85,798,656 in ViT-B/16.
    Saves: nothing: a step computes all gradients and keeps optimiser state for all weights, all of which are stored;
    inference costs the same as frozen encoders.
    Source: common practice; Adam without weight decay as in Fu et al., IISAN, SIGIR 2024.
    """

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Make both encoders trainable."""
        model.encoders.requires_grad_(True)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """The size of the encoders."""
        encoders = sum(value.numel() for view in views.values() for value in view.module.parameters())
        return encoders + fusion_parameters(task)
