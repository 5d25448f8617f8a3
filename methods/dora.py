"""DoRA (Liu et al., ICML 2024): LoRA with a trained magnitude for every row of a weight, through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tpme.bench.record import Modality
from tpme.bench.task.view import EncoderView
from tpme.methods.base import TaskShape
from tpme.methods.lora import LoRA
from tpme.methods.parts.low_rank import adapted_weights


class DoRA(LoRA):
    """Applies LoRA to the direction of every weight row, and trains the row's magnitude separately.

    ``W' = m * (W + s B A) / ||W + s B A||``, s = alpha / r (equation 5); the norm is taken by row and held constant in
    the backward pass (section 4.3 and equation 11). A and B start as LoRA's, m (out,) as the row norms of W.

    Trains: A, B and m of queries and values (r = 8): 313,344 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; a step costs more time and memory than LoRA's, because it
    builds W + s B A and its row norms; inference costs the same as frozen encoders, because W' replaces W.
    Source: Liu et al., DoRA, ICML 2024.
    """

    name: ClassVar[str] = "dora"
    decomposed: ClassVar[bool] = True

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """LoRA's, and a magnitude for every output of an adapted projection."""
        weights = adapted_weights(views.values(), self.config.targets)
        return sum(map(len, weights)) + super().trainable_parameters(task, views)
