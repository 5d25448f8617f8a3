"""Pfeiffer adapters against the layers written out by hand."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn


def test_it_reads_the_normalised_output_in_bert_and_the_residual_stream_in_vit(tiny: ModuleType) -> None:
    torch.manual_seed(0)
    _, model = tiny.build("pfeiffer-adapter", {"bottleneck": 3})
    for modality, view in model.views.items():
        plain = tiny.views()[modality]
        adapters = list(view.module.get_submodule("adapters"))
        assert len(adapters) == tiny.DEPTH
        x = torch.randn(2, 5, tiny.WIDTH)
        for i, adapter in enumerate(adapters):
            for linear in (adapter.down, adapter.up):
                nn.init.normal_(linear.weight)
                nn.init.normal_(linear.bias)
            layer = plain.layers[i]
            if modality == "text":
                h = layer.attention(x)[0]
                f = layer.output.dense(layer.intermediate(h))
                norm = layer.output.LayerNorm
                expected = norm(h + f + adapter.up(torch.relu(adapter.down(norm(h + f)))))
            else:
                h = x + layer.attention(layer.layernorm_before(x))[0]
                y = h + layer.mlp(layer.layernorm_after(h))
                expected = y + adapter.up(torch.relu(adapter.down(y)))
            torch.testing.assert_close(view.layers[i](x), expected, atol=1e-5, rtol=1e-5)


def test_it_starts_near_the_frozen_encoders(tiny: ModuleType) -> None:
    _, model = tiny.build("pfeiffer-adapter")
    _, frozen = tiny.build("frozen")
    items = tiny.items()
    start, plain = tiny.vectors(model, items), tiny.vectors(frozen, items)
    torch.testing.assert_close(start, plain, atol=1e-2, rtol=1e-2)
    assert not torch.equal(start, plain)
