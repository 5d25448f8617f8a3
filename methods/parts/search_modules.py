"""The modules of one configuration of AutoPEFT: adapters beside the feed-forward sub-layer, and prefixes."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from tpme.bench.task.view import EncoderView
from tpme.methods.parts.attention import extend_attention
from tpme.methods.parts.bottleneck import Bottleneck
from tpme.methods.parts.parallel import ParallelBottleneck, add_parallel
from tpme.methods.parts.search_space import EncoderModules
from tpme.methods.prefix import Prefix, PrefixConfig, prepend


def add_modules(view: EncoderView, modules: EncoderModules, scale: float) -> None:
    """Add the modules of a configuration to an encoder; nothing to a layer that is not named."""
    width, active = view.shape.width, modules.active(view.shape.depth)
    parts = nn.ModuleDict()
    prefix = Prefix(view, PrefixConfig(length=modules.prefix)) if modules.prefix and active else None
    if prefix is not None:
        prefix.layers = prefix.layers[: len(active)]
        parts["prefix"] = prefix
    for place, layer in enumerate(active):
        if modules.serial:
            # An encoder with a final norm is pre-norm: its layers do not end with one.
            norm = view.norms(layer)[1] if view.final_norm is None else None
            parts[f"serial_{layer}"] = serial = Bottleneck(width, modules.serial)
            add_parallel(view, layer, partial(_add_serial, serial, norm))
        if modules.parallel:
            parts[f"parallel_{layer}"] = parallel = ParallelBottleneck(width, modules.parallel, scale)
            add_parallel(view, layer, partial(_add_parallel, parallel))
        if prefix is not None:
            extend_attention(view, layer, partial(prepend, prefix, place))
    view.module.add_module("found_modules", parts)


def _add_serial(part: Bottleneck, norm: nn.Module | None, x: Tensor, f: Tensor) -> Tensor:
    """``f + SA(LN(x + f))``; in a pre-norm layer without LN."""
    return f + part.change(x + f if norm is None else norm(x + f))


def _add_parallel(part: ParallelBottleneck, x: Tensor, f: Tensor) -> Tensor:
    """``f + s PA(x)``; f holds the change of a serial adapter, too, which does not read it."""
    out: Tensor = f + part(x)
    return out
