"""Pfeiffer adapters (Pfeiffer et al., EACL 2021): one bottleneck in every layer, behind the feed-forward sub-layer."""

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
    """One bottleneck a layer, behind the feed-forward sub-layer and its residual, where Houlsby's have two.

    ``y = LN(x + f + W_up act(W_down LN(x + f)))``, f = FFN(x), in a post-norm layer (BERT), whose own frozen LN is
    applied twice; ``y = x + f + W_up act(W_down (x + f))``, f = FFN(LN(x)), in a pre-norm layer (ViT). The encoder's
    norms stay frozen. Weights start at N(0, 0.01): nearly, not exactly, the frozen encoder. b = 64 instead of the
    paper's D / 16, so that a row compares with the other adapters.

    Trains: the bottlenecks, 2 x 1,189,632 of the encoders at b = 64.
    Saves: half of Houlsby's parameters and stored size; training and inference cost a little more than frozen layers.
    Source: Pfeiffer et al., AdapterFusion, EACL 2021, section 3 and figure 2; pre-norm form as in AdapterHub.
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
