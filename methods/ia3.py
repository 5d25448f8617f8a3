"""(IA)^3 (Liu et al., NeurIPS 2022): trained scales of keys, values and the feed-forward activation, through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tpme.bench.record import Modality
from tpme.bench.task.view import EncoderView
from tpme.methods.base import TaskShape, fusion_parameters
from tpme.methods.parts.peft_injection import PeftMethod


class IA3(PeftMethod):
    """Rescales keys, values and the feed-forward activation by one trained vector each.

    ``k' = l_k * (W_k x), v' = l_v * (W_v x), f' = W_2 (l_f * act(W_1 x))`` (section 3.3); l_k (D,), l_v (D,) and l_f
    (F,) start at one.

    Trains: l_k, l_v and l_f of every layer: 55,296 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; training keeps nearly as many activations as full
    fine-tuning; inference costs the same as frozen encoders, because the vectors are merged into W_k, W_v and W_2.
    Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, NeurIPS 2022.
    """

    name: ClassVar[str] = "ia3"

    def settings(self, view: EncoderView) -> Any:
        """Keys and values are scaled at their output, the second feed-forward linear at its input."""
        from peft import IA3Config

        ffn = view.projections("ffn_out")
        return IA3Config(target_modules=view.projections("key", "value") + ffn, feedforward_modules=ffn)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Widths of keys, values and feed-forward activation, 2 D + F in a BERT or ViT, in each of L layers."""
        widths = [
            view.shape.depth * (2 * view.heads.key_value * view.heads.width + view.ffn_width) for view in views.values()
        ]
        return sum(widths) + fusion_parameters(task)
