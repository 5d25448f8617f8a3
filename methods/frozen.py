"""Frozen encoders: only the recommender's own parts train."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.record import Modality
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, TaskShape, fusion_parameters


class FrozenEncoders(Method):
    """The last hidden state of frozen encoders, projected and fused: the baseline of adaptation.

    ``W_f [gelu(W_image h_image) | gelu(W_text h_text)]``, h the final state of each encoder.

    Trains: only the recommender's own parts, 206,912 at BERT-base + ViT-B/16.
    Saves: all gradients of the encoders, which also can be cached.
    Source: the usual baseline of transfer without adaptation.
    """

    decoupled = True
    baseline = True

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """The item encoder alone."""
        return fusion_parameters(task)
