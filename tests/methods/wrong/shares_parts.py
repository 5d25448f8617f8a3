"""Adapters that a deep copy of the model shares with its original."""

from torch import nn

from tpme.methods.adapter import HoulsbyAdapter
from tpme.methods.parts.bottleneck import Bottleneck

FAILS = "deep_copy_is_independent"


class SharesParts(HoulsbyAdapter):
    """Its hooks are closures, which are not copied."""

    def adapt(self, model, schedule):
        for view in model.views.values():
            parts = nn.ModuleList()
            for layer in range(view.shape.depth):
                for output in view.sublayer_outputs(layer):
                    adapter = Bottleneck(view.shape.width, self.config.bottleneck, self.config.activation)
                    output.register_forward_hook(lambda _module, _args, out, own=adapter: own(out))
                    parts.append(adapter)
            view.module.add_module("adapters", parts)


METHOD = SharesParts
