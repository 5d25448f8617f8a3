"""BitFit (Ben Zaken et al., ACL 2022): only bias terms train."""

from __future__ import annotations

from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Method, Schedule


class BitFit(Method):
    """Every encoder parameter named ``bias`` trains: linear, LayerNorm and patch-embedding biases.

    Trainable at BERT-base + ViT-B/16: 102,144 + 102,912 of the encoders.
    """

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Make the biases of both encoders trainable."""
        for name, parameter in model.encoders.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
