"""Adapters behind token dispatchers: the last dispatcher learns from its own term of the loss alone."""

from functools import partial

import torch
from pydantic import PositiveInt
from torch import nn

from tpme.methods.base import Method, MethodConfig, fusion_parameters
from tpme.methods.parts.bottleneck import Bottleneck, bottleneck_parameters


class DispatchConfig(MethodConfig):
    """Bottleneck width, and the share of the tokens that should pass an adapter."""

    bottleneck: PositiveInt = 4
    rate: float = 0.5


class Dispatched(nn.Module):
    """``h + g A(h)`` per token, ``g = sigmoid(w h)``, and g = 1 for token 0, which the item encoder reads."""

    def __init__(self, width, bottleneck):
        super().__init__()
        self.adapter = Bottleneck(width, bottleneck)
        self.dispatcher = nn.Linear(width, 1, bias=False)

    def forward(self, hidden):
        gates = self.dispatcher(hidden).sigmoid()
        first = torch.arange(hidden.shape[1], device=hidden.device)[:, None] == 0
        return hidden + torch.where(first, 1.0, gates) * (self.adapter(hidden) - hidden), gates


class DynamicTokens(Method):
    """In the last layer only token 0 is read, which always passes: its dispatcher learns from ``rate`` alone."""

    Config = DispatchConfig
    identity_at_start = False

    def __init__(self, config):
        super().__init__(config)
        self.rates = []

    def adapt(self, model, schedule):
        for view in model.views.values():
            parts = nn.ModuleList(Dispatched(view.shape.width, self.config.bottleneck) for _ in view.layers)
            view.module.add_module("dispatched", parts)
            for layer, part in enumerate(parts):
                view.sublayer_outputs(layer)[1].register_forward_hook(partial(_dispatch, part, self.rates))

    def trainable_parameters(self, task, views):
        shapes = [view.shape for view in views.values()]
        parts = sum(s.depth * (bottleneck_parameters(s.width, self.config.bottleneck) + s.width) for s in shapes)
        return parts + fusion_parameters(task)

    def begin_pass(self, name, model):
        self.rates.clear()

    def losses(self, outputs):
        rates = torch.stack(self.rates)
        self.rates.clear()
        return super().losses(outputs) | {"rate": (rates - self.config.rate).square().sum()}

    def after_backward(self, state):
        self.rates.clear()  # recomputation fills them again


def _dispatch(part, rates, _module, _args, output):
    hidden, gates = part(output)
    if part.training:
        rates.append(gates.float().mean())
    return hidden


METHOD = DynamicTokens
