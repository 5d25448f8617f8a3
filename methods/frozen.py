"""Frozen encoders: only the recommender's own parts train."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.record import Modality
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, TaskShape, fusion_parameters


class FrozenEncoders(Method):
    """Trains only the recommender's own parts on the last hidden states of the frozen encoders.

    ``W_f [gelu(W_image h_image) | gelu(W_text h_text)]``, h the final state of each encoder, pooled; biases left out
    here.

    Trains: heads and fusion: 106,688 beside BERT-base and ViT-B/16.
    Saves: all gradients and optimiser state of the encoders, whose states can be cached, and stored size; inference
    still runs both encoders.
    Source: common practice.
    """

    decoupled = True
    baseline = True

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """The item encoder alone."""
        return fusion_parameters(task)
