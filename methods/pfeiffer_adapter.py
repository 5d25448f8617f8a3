"""Pfeiffer adapters (Pfeiffer et al., EACL 2021): one bottleneck in every layer, after the feed-forward sub-layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.adapter import AdapterConfig
from tpme.methods.base import Method, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.bottleneck import Bottleneck, bottleneck_parameters
from tpme.methods.parts.parallel import add_parallel


class PfeifferAdapter(Method):
    """Inserts one trained bottleneck into every layer, after the feed-forward sub-layer and its residual.

    ``y = LN(x + f + W_up act(W_down LN(x + f)))`` with f = FFN(x) in a post-norm layer (BERT), which applies its frozen
    LN twice; ``y = x + f + W_up act(W_down (x + f))`` with f = FFN(LN(x)) in a pre-norm layer (ViT), as in AdapterHub
    (section 3 and figure 2 of the paper). The encoder's own norms stay frozen. Weights start at N(0, 0.01), so the
    encoder is at first nearly, not exactly, the frozen one. b is 64, as for the other adapters, and not the paper's D /
    16.

    Trains: bottlenecks (b = 64): 1,189,632 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; inference costs one bottleneck a layer (in BERT also one
    norm) more than frozen encoders.
    Source: Pfeiffer et al., AdapterFusion, EACL 2021.
    """

    Config = AdapterConfig
    config: AdapterConfig
    identity_at_start = False

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Add a bottleneck to the feed-forward output of every layer."""
        for view in model.views.values():
            parts = nn.ModuleList()
            for layer in range(view.shape.depth):
                adapter = Bottleneck(view.shape.width, self.config.bottleneck, self.config.activation)
                # An encoder with a final norm is pre-norm: its layers do not end with one.
                norm = view.norms(layer)[1] if view.final_norm is None else None
                add_parallel(view, layer, partial(_add, adapter, norm))
                parts.append(adapter)
            view.module.add_module("adapters", parts)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """One bottleneck, 2 D b + b + D, in each of L layers."""
        shapes = [view.shape for view in views.values()]
        adapters = sum(shape.depth * bottleneck_parameters(shape.width, self.config.bottleneck) for shape in shapes)
        return adapters + fusion_parameters(task)


def _add(adapter: Bottleneck, norm: nn.Module | None, x: Tensor, f: Tensor) -> Tensor:
    states = x + f
    return f + adapter.change(states if norm is None else norm(states))
