"""LST: the ladder written out by hand, its gates, the pruned start, and what the builder of a cache stores of it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from tpme.bench.contract.small_encoders import small_encoder
from tpme.bench.errors import UserError
from tpme.bench.task.items import EncoderShape, TokenStates
from tpme.bench.task.view import EncoderView
from tpme.methods.base import TaskShape
from tpme.methods.lst import Ladder, LSTConfig, SideLayer, kept_layers, pruned_state
from tpme.methods.registry import create

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def ladder(depth: int = 4, pool: Any = "first", **options: Any) -> Ladder:
    part = Ladder(EncoderShape(16, depth, pool, heads=2), LSTConfig(**options)).eval()
    with torch.no_grad():
        for value in part.parameters():
            value.add_(0.1 * torch.randn_like(value))  # biases and norms that matter
    return part


def states(part: Ladder, items: int = 3, tokens: int = 5) -> Tensor:
    return torch.randn(items, part.reads.count, tokens, 16)


def some_masked() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


# --- what it computes -------------------------------------------------------------------------------------------------


def as_torchs_layer(side: SideLayer) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer with the same weights."""
    width = side.query.in_features
    layer = nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat([side.query.weight, side.key_value.weight]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([side.query.bias, side.key_value.bias]))
    layer.self_attn.out_proj.load_state_dict(side.attention_output.state_dict())
    pairs = {"linear1": "ffn_in", "linear2": "ffn_out", "norm1": "attention_norm", "norm2": "ffn_norm"}
    for theirs, ours in pairs.items():
        getattr(layer, theirs).load_state_dict(getattr(side, ours).state_dict())
    return layer


@pytest.mark.parametrize("pool", ["first", "mean", "last"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_ladder_written_out(pool: str, masked: bool) -> None:
    part = ladder(pool=pool, dropped=(1,))
    given, mask = states(part), some_masked() if masked else torch.ones(3, 5).bool()
    assert part.reads.levels == (0, 1, 3, 4)
    with torch.no_grad():
        side = part.down[0](given[:, 0])
        for k, layer in enumerate(part.layers):
            gate = 1 / (1 + (-part.gates[k] / 0.1).exp())
            side = gate * side + (1 - gate) * part.down[k + 1](given[:, k + 1])
            side = as_torchs_layer(layer)(side, src_key_padding_mask=~mask)
        if pool == "mean":
            pooled = torch.stack([row[keep].mean(0) for row, keep in zip(side, mask, strict=True)])
        else:
            pooled = torch.stack(
                [row[keep][0 if pool == "first" else -1] for row, keep in zip(side, mask, strict=True)]
            )
        expected = part.up(functional.layer_norm(pooled, (8,), part.norm.weight, part.norm.bias))
        torch.testing.assert_close(part(given, mask if masked else None), expected, **CLOSE)


@pytest.mark.parametrize("pool", ["first", "mean", "last"])
def test_masked_tokens_change_nothing(pool: str) -> None:
    part, mask = ladder(pool=pool), some_masked()
    given = states(part)
    other = torch.where(mask[:, None, :, None], given, 99.0)
    with torch.no_grad():
        torch.testing.assert_close(part(other, mask), part(given, mask), **CLOSE)
        assert not torch.allclose(part(other, None), part(given, None), atol=1e-2)


def test_gates_start_at_one_half_and_follow_the_temperature() -> None:
    part = Ladder(EncoderShape(16, 8, heads=2), LSTConfig(temperature=0.5))
    assert part.gate_values().tolist() == [0.5] * 6
    with torch.no_grad():
        part.gates.fill_(0.5)
    torch.testing.assert_close(part.gate_values(), torch.full((6,), torch.tensor(1.0).sigmoid().item()))


def test_open_gates_leave_the_side_path_alone() -> None:
    part = ladder()
    with torch.no_grad():
        part.gates.fill_(torch.inf)
        given = states(part)
        other = given.clone()
        other[:, 1:] = torch.randn_like(other[:, 1:])
        assert torch.equal(part(other, None), part(given, None)), "no layer of the encoder feeds it"
        side = part.down[0](given[:, 0])
        for layer in part.layers:
            side = layer(side, None)
        torch.testing.assert_close(part(given, None), part.up(part.norm(side[:, 0])), **CLOSE)
        part.gates.fill_(0.0)
        assert not torch.allclose(part(other, None), part(given, None), atol=1e-3)


def test_which_layers_are_kept() -> None:
    assert kept_layers(12, LSTConfig()) == (1, 2, 3, 5, 6, 7, 9, 10, 11)
    assert kept_layers(4, LSTConfig(dropped=())) == (0, 1, 2, 3)
    for dropped in ((), (0,), (1, 2), (0, 1, 2), None):
        part = ladder(dropped=dropped)
        assert len(part.layers) == len(part.gates) == len(part.down) - 1 == part.reads.count - 1
        assert part(states(part), None).shape == (3, 16)


@pytest.mark.parametrize("modalities", [("text",), ("image",), ("text", "image")])
def test_no_gradient_enters_the_encoders(tiny: ModuleType, modalities: Any) -> None:
    _, model = tiny.build("lst", modalities=modalities)
    model.train()
    batch = tiny.batch(modalities)
    for modality in modalities:
        read = model.states(modality, batch.items)
        assert isinstance(read, TokenStates)
        assert read.states.grad_fn is None
        assert not read.states.requires_grad
        assert all(read.states[:, level].is_contiguous() for level in range(read.states.shape[1]))
    tiny.loss_of(model, batch).backward()
    assert all(value.grad is None for value in model.encoders.parameters())
    assert all(value.grad is not None for value in model.item_encoder.parameters())


def test_head_and_fusion_train_at_the_recommenders_rate(tiny: ModuleType) -> None:
    _, model = tiny.build("lst")
    groups = {name: sum(value.numel() for value in values) for name, values in model.parameter_groups().items()}
    assert set(groups) == {"recommender", "method"}
    assert groups["method"] == sum(value.numel() for value in model.item_encoder.ladders.parameters())


# --- the pruned start -------------------------------------------------------------------------------------------------


def test_without_pruning_a_side_layer_is_the_encoders(tiny: ModuleType) -> None:
    """A ViT's layer, whose norms are the plain ones that side layers start with; nothing narrower."""
    module = tiny.encoder("image", intermediate_size=64)
    for norm in (part for part in module.modules() if isinstance(part, nn.LayerNorm)):
        norm.reset_parameters()
    view = EncoderView(module, "image")
    config = LSTConfig(reduction=1, dropped=(0,))
    part = Ladder(view.shape, config).eval()
    part.load_state_dict(dict(pruned_state(view, config)), strict=False)
    part.layers[0].attention_norm.eps = part.layers[0].ffn_norm.eps = module.config.layer_norm_eps
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(part.layers[0](x, None), view.layers[1](x), **CLOSE)
        assert torch.equal(part.down[1](x), x)


def test_the_most_read_dimensions_and_the_largest_inner_ones_are_kept(tiny: ModuleType) -> None:
    module = tiny.encoder("text", intermediate_size=64)
    view, stream, wide = EncoderView(module, "text"), [1, 3, 4, 7, 8, 10, 13, 15], list(range(20, 52))
    attention = view.layers[1].attention
    with torch.no_grad():
        for layer in view.layers:
            layer.attention.self.query.weight[:, stream] += 50.0
        view.layers[1].intermediate.dense.weight[wide] += 50.0
        for part in (attention.self.query, attention.self.key, attention.self.value):
            part.weight[[0, 2, 5, 6, 9, 11, 12, 15]] += 20.0  # four of each head of eight
        attention.self.key.weight[1] += 30.0  # one factor of the product alone
    state = dict(pruned_state(view, LSTConfig(reduction=2, dropped=(0,))))
    rows = [0, 2, 5, 6, 9, 11, 12, 15]
    torch.testing.assert_close(state["down.1.weight"], torch.eye(16)[stream])
    layer = view.layers[1]
    expected = {
        "query": attention.self.query.weight[rows][:, stream],
        "attention_output": attention.output.dense.weight[stream][:, rows],
        "ffn_in": layer.intermediate.dense.weight[wide][:, stream],
        "ffn_out": layer.output.dense.weight[stream][:, wide],
    }
    for name, weight in expected.items():
        assert torch.equal(state[f"layers.0.{name}.weight"], weight), name
    key, value = state["layers.0.key_value.weight"].chunk(2)
    assert torch.equal(key, attention.self.key.weight[rows][:, stream])
    assert torch.equal(value, attention.self.value.weight[rows][:, stream])
    biases = torch.cat([attention.self.key.bias[rows], attention.self.value.bias[rows]])
    assert torch.equal(state["layers.0.key_value.bias"], biases)


def test_heads_share_the_keys_and_values_of_a_decoder() -> None:
    view = EncoderView(small_encoder("llama", width=16, depth=2), "text")
    assert view.heads.key_value < view.heads.number
    state = dict(pruned_state(view, LSTConfig()))
    assert state["layers.0.key_value.weight"].shape == (16, 8)
    assert not state["layers.0.query.bias"].any(), "it has no biases"


def test_heads_narrower_than_the_side_networks_are_refused() -> None:
    settings = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 128}
    view = EncoderView(LlamaModel(LlamaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=20, **settings)), "text")
    assert dict(pruned_state(view, LSTConfig(reduction=4)))["layers.0.query.weight"].shape == (8, 8)
    with pytest.raises(UserError, match="the heads of the text encoder are 8 wide together, the side network would be"):
        dict(pruned_state(view, LSTConfig(reduction=2)))


def test_a_start_from_weights_and_a_random_one(tiny: ModuleType) -> None:
    method, model = tiny.build("lst")
    both = method.initial_state(tiny.views())
    assert all(torch.equal(model.item_encoder.state_dict()[name], value) for name, value in both.items())
    assert {name.split(".")[1] for name in both} == {"text", "image"}
    for modality in ("text", "image"):  # as the builders of the two caches, with one encoder each
        alone = method.initial_state(tiny.views([modality]))
        assert alone.keys() == {name for name in both if name.startswith(f"ladders.{modality}.")}
        assert all(torch.equal(value, both[name]) for name, value in alone.items())
    assert create("lst", {"init": "random"}).initial_state(tiny.views()) == {}


def test_wrong_sizes_are_one_line() -> None:
    def build(depth: int = 2, width: int = 16, heads: int = 2, **options: Any) -> None:
        task = TaskShape(8, 5, {"text": EncoderShape(width, depth, heads=heads)})
        create("lst", options).item_encoder(task)

    build()
    for message, changes in {
        "the text encoder has no layer 2; its layers are 0 to 1": {"dropped": (0, 2)},
        "'dropped' names all 2 layers of the text encoder": {"dropped": (0, 1)},
        "gives a side network of width 10, which its 4 heads do not divide": {"width": 80, "heads": 4},
        "option 'reduction'": {"reduction": 0},
        "option 'dropped": {"dropped": (-1,)},
        "option 'init'": {"init": "fisher"},
    }.items():
        with pytest.raises(UserError, match=message) as error:
            build(**changes)
        assert "\n" not in str(error.value)
    narrow = EncoderView(small_encoder("vit", width=16), "image")
    with pytest.raises(UserError, match="is 32 wide, that of a side layer would be 64; raise reduction or set init"):
        create("lst", {"reduction": 1}).initial_state({"image": narrow})
