"""LoRA over items that must be distinct, and no padding."""

from tpme.bench.task.recommender import TokenFusion
from tpme.methods.lora import LoRA

FAILS = "trains_under_the_paper_protocol"


class DistinctFusion(TokenFusion):
    """Raises for the padding item."""

    def forward(self, states, ids):
        if not bool(ids.is_meta or (ids > 0).all()):
            raise ValueError("item 0 is padding")
        return super().forward(states, ids)


class RefusesPadding(LoRA):
    """Under the paper protocol every slot is encoded, padding included."""

    def item_encoder(self, task):
        return DistinctFusion(task.encoders, task.dim)


METHOD = RefusesPadding
