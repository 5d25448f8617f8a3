"""Parallel adapters against the layers written out by hand."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from tpme.bench.errors import UserError
from tpme.methods.registry import create


@pytest.mark.parametrize("scale", [4.0, 0.5])
def test_it_reads_the_input_of_the_feed_forward_half(tiny: ModuleType, scale: float) -> None:
    torch.manual_seed(0)
    _, model = tiny.build("parallel-adapter", {"bottleneck": 3} | ({} if scale == 4 else {"scale": scale}))
    for modality, view in model.views.items():
        plain = tiny.views()[modality]
        adapters = list(view.module.get_submodule("adapters"))
        assert len(adapters) == tiny.DEPTH
        x = torch.randn(2, 5, tiny.WIDTH)
        for i, adapter in enumerate(adapters):
            for value in (adapter.up.weight, adapter.down.bias, adapter.up.bias):
                nn.init.normal_(value)
            halves = plain.halves(i)
            h, layer = halves.attention(x), plain.layers[i]
            branch = scale * adapter.up(torch.relu(adapter.down(h)))
            if modality == "text":
                expected = layer.output.LayerNorm(h + layer.output.dense(layer.intermediate(h)) + branch)
            else:
                expected = halves.feed_forward(h) + branch
            torch.testing.assert_close(view.layers[i](x), expected, atol=1e-5, rtol=1e-5)


def test_its_up_projection_starts_at_zero(tiny: ModuleType) -> None:
    _, model = tiny.build("parallel-adapter")
    _, frozen = tiny.build("frozen")
    assert torch.equal(tiny.vectors(model, tiny.items()), tiny.vectors(frozen, tiny.items()))
    for view in model.views.values():
        for adapter in view.module.get_submodule("adapters"):
            assert adapter.up.weight.detach().eq(0).all()
            assert not adapter.down.weight.detach().eq(0).any()


@pytest.mark.parametrize("options", [{"bottleneck": 0}, {"scale": 0}, {"dropout": 1}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"method 'parallel-adapter', option '{next(iter(options))}'"):
        create("parallel-adapter", options)
