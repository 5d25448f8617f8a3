"""LoRA that computes something else where it is compiled."""

import torch

from tpme.bench.task.recommender import TokenFusion
from tpme.methods.lora import LoRA

FAILS = "compiled_equals_eager"


class CompiledFusion(TokenFusion):
    """Twice the vectors in compiled code."""

    def forward(self, states, ids):
        vectors = super().forward(states, ids)
        return 2 * vectors if torch.compiler.is_compiling() else vectors


class CompilesToAnother(LoRA):
    """Eager it is LoRA."""

    def item_encoder(self, task):
        return CompiledFusion(task.encoders, task.dim)


METHOD = CompilesToAnother
