"""Full fine-tuning: every weight of both encoders trains."""

from __future__ import annotations

from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Method, Schedule


class FullFineTuning(Method):
    """All encoder parameters train: the reference for all other rows.

    Trainable at BERT-base + ViT-B/16: 194,897,216 (no pooler).
    """

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Make both encoders trainable."""
        model.encoders.requires_grad_(True)
