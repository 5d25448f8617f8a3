"""Scaled parallel adapters (He et al., ICLR 2022): one bottleneck in every layer, beside the feed-forward sub-layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.bottleneck import bottleneck_parameters
from tpme.methods.parts.parallel import ParallelBottleneck, add_parallel


class ParallelAdapterConfig(MethodConfig):
    """Bottleneck width b, scale s of the branch, and dropout of its activation."""

    bottleneck: PositiveInt = 64
    scale: PositiveFloat = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ParallelAdapter(Method):
    """Adds one scaled bottleneck to every layer, beside the feed-forward sub-layer, whose input it reads.

    ``y = x + FFN(LN(x)) + s W_up relu(W_down x)`` in a pre-norm layer (ViT);
    ``y = LN(x + FFN(x) + s W_up relu(W_down x))`` in a post-norm one (BERT). x is the input of the sub-layer before its
    norm; s = 4 (table 1 and section 4 of the paper). W_down starts Kaiming-uniform (a = sqrt 5), W_up at zero, so the
    encoder is at first exactly the frozen one. b is 64, as for the other adapters, and not the paper's 512.

    Trains: bottlenecks (b = 64): 1,189,632 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; inference costs one bottleneck a layer more than frozen
    encoders.
    Source: He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022.
    """

    Config = ParallelAdapterConfig
    config: ParallelAdapterConfig

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Add a bottleneck beside the feed-forward sub-layer of every layer."""
        settings = self.config
        for view in model.views.values():
            width, depth = view.shape.width, view.shape.depth
            parts = [
                ParallelBottleneck(width, settings.bottleneck, settings.scale, settings.dropout) for _ in range(depth)
            ]
            for layer, part in enumerate(parts):
                add_parallel(view, layer, partial(_add, part))
            view.module.add_module("adapters", nn.ModuleList(parts))

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """One bottleneck, 2 D b + b + D, in each of L layers."""
        shapes = [view.shape for view in views.values()]
        adapters = sum(shape.depth * bottleneck_parameters(shape.width, self.config.bottleneck) for shape in shapes)
        return adapters + fusion_parameters(task)


def _add(part: ParallelBottleneck, x: Tensor, f: Tensor) -> Tensor:
    out: Tensor = f + part(x)
    return out
