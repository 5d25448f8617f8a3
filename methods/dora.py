"""DoRA (Liu et al., ICML 2024), through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tpme.bench.record import Modality
from tpme.bench.task.view import EncoderView
from tpme.methods.base import TaskShape
from tpme.methods.lora import LoRA


class DoRA(LoRA):
    """LoRA on the direction of a weight; the magnitude of each of its rows is trained apart.

    ``W' = m * (W + s B A) / ||W + s B A||``, s = alpha / r; the norm is that of a row and is taken as a constant in the
    backward pass (section 4.3 of the paper). A and B start as LoRA's, m (out,) as the norms of W.

    Trains: A, B and m of queries and values, 313,344 per encoder at BERT-base + ViT-B/16 with r = 8.
    Saves: optimiser state and stored size; a training step costs more than LoRA's, because every forward pass builds
    B A and its row norms; nothing at inference, where W' replaces W.
    Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, equations 5 and 11.
    """

    name: ClassVar[str] = "dora"
    decomposed: ClassVar[bool] = True

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """LoRA's, and a magnitude for every output of an adapted projection."""
        outputs = [
            len(view.module.get_parameter(f"{name}.weight"))
            for view in views.values()
            for name in view.projections(*self.config.targets)
        ]
        return sum(outputs) + super().trainable_parameters(task, views)
