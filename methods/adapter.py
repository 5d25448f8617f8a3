"""Houlsby adapters (Houlsby et al., ICML 2019): two bottlenecks in every layer, one after each sub-layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import PositiveInt
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.bottleneck import Activation, Bottleneck, bottleneck_parameters


class AdapterConfig(MethodConfig):
    """Bottleneck width b and activation."""

    bottleneck: PositiveInt = 64
    activation: Activation = "relu"


class HoulsbyAdapter(Method):
    """Inserts two trained bottlenecks into every layer of the frozen encoders, one after each sub-layer.

    ``A(h) = h + W_up act(W_down h)`` on the output h of a sub-layer, before the residual is added (section 2). The
    encoder's own norms stay frozen. Weights start at N(0, 0.01), so the encoder is at first nearly, not exactly, the
    frozen one.

    Trains: bottlenecks (b = 64): 2,379,264 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; inference costs two bottlenecks a layer more than frozen
    encoders.
    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019.
    """

    Config = AdapterConfig
    config: AdapterConfig
    identity_at_start = False

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Add a bottleneck after every attention and feed-forward output."""
        for view in model.views.values():
            parts = nn.ModuleList()
            for layer in range(view.shape.depth):
                for output in view.sublayer_outputs(layer):
                    adapter = Bottleneck(view.shape.width, self.config.bottleneck, self.config.activation)
                    # A partial, not a closure: a deep copy of the model then runs its own copies of the adapters.
                    output.register_forward_hook(partial(_apply, adapter))
                    parts.append(adapter)
            view.module.add_module("adapters", parts)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Two bottlenecks, 2 D b + b + D each, in each of L layers."""
        shapes = [view.shape for view in views.values()]
        adapters = sum(shape.depth * 2 * bottleneck_parameters(shape.width, self.config.bottleneck) for shape in shapes)
        return adapters + fusion_parameters(task)


def _apply(adapter: Bottleneck, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
    adapted: Tensor = adapter(output)
    return adapted
