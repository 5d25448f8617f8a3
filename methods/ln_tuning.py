"""LN tuning (Zhao et al., ICLR 2024): only the norms train."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule, TaskShape, fusion_parameters


class LNTuning(Method):
    """Trains only the scale and shift of the encoders' norms.

    ``y = g * (x - mean(x)) / std(x) + b``, g and b (D,) train; an RMS norm has no b. The norms are the two of every
    layer, that of the embeddings, and the final one, as far as an encoder has them.

    Trains: g and b of 25 norms: 38,400 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; inference costs the same as frozen encoders.
    Source: Zhao et al., Tuning LayerNorm in Attention, ICLR 2024.
    """

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Let every norm train. Raises UserError for an encoder whose norms have no parameters."""
        for view in model.views.values():
            norms = [part for part in view.module.modules() if type(part).__name__.endswith("Norm")]
            if not any(True for norm in norms for _ in norm.parameters()):
                raise UserError(
                    f"method 'ln-tuning': {type(view.module).__name__} ({view.modality} encoder) has no norm with "
                    "parameters; choose another encoder"
                )
            for norm in norms:
                norm.requires_grad_(True)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """The sizes of all parameters of a submodule that is named a norm: (2 L + 1) 2 D in a BERT or ViT."""
        named = [entry for view in views.values() for entry in view.module.named_parameters()]
        return sum(p.numel() for name, p in named if "norm" in name.lower()) + fusion_parameters(task)
