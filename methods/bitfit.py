"""BitFit (Ben Zaken et al., ACL 2022): only the biases train."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule, TaskShape, fusion_parameters


class BitFit(Method):
    """Trains only the biases of the encoders.

    ``y = W x + b``, b trains: every encoder parameter named bias, of linear layers, norms and the patch embedding. An
    encoder without biases is refused.

    Trains: all biases: 102,144 in BERT-base, 102,912 in ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; inference costs the same as frozen encoders.
    Source: Ben Zaken et al., BitFit, ACL 2022.
    """

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Make the biases of both encoders trainable. Raises UserError for an encoder without any."""
        for modality, view in model.views.items():
            biases = [value for name, value in view.module.named_parameters() if name.endswith("bias")]
            if not biases:
                raise UserError(
                    f"method 'bitfit': {type(view.module).__name__} ({modality} encoder) has no biases; choose another"
                )
            for bias in biases:
                bias.requires_grad_(True)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """The sizes of all biases: L (7 D + F) in the layers of a BERT or ViT with feed-forward width F."""
        named = [entry for view in views.values() for entry in view.module.named_parameters()]
        return sum(value.numel() for name, value in named if name.endswith("bias")) + fusion_parameters(task)
