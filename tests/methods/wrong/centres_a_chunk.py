"""LoRA over item vectors that depend on which items are encoded together."""

from tpme.bench.task.recommender import TokenFusion
from tpme.methods.lora import LoRA

FAILS = "chunks_change_nothing"


class CentredFusion(TokenFusion):
    """Subtracts the mean of the items at hand."""

    def forward(self, states, ids):
        vectors = super().forward(states, ids)
        return vectors - vectors.mean(dim=0)


class CentresAChunk(LoRA):
    """Batch statistics in evaluation."""

    def item_encoder(self, task):
        return CentredFusion(task.encoders, task.dim)


METHOD = CentresAChunk
