"""What each method computes, against the same thing written out by hand."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ElectraConfig, ElectraModel

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.evaluate import item_matrix
from tpme.bench.task.items import EncoderShape, Items, Reads
from tpme.bench.task.ranking import rank_targets
from tpme.bench.task.recommender import Recommender, TokenFusion
from tpme.bench.task.view import EncoderView
from tpme.methods.base import TaskShape
from tpme.methods.id import ItemTable
from tpme.methods.iisan import IISAN, side_levels
from tpme.methods.parts.bottleneck import Bottleneck
from tpme.methods.parts.side_network import SideConfig, SideNetwork
from tpme.methods.registry import create

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def encode(view: EncoderView, items: Items) -> Tensor:
    with torch.no_grad():
        return view.encode(Reads(final=True), tokens=items.tokens, token_mask=items.token_mask, image=items.image)[:, 0]


# --- adapter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bottleneck(activation: str) -> None:
    part, x = Bottleneck(6, 3, activation), torch.randn(4, 6)
    act = {"relu": nn.functional.relu, "gelu": nn.functional.gelu}[activation]
    expected = x + act(x @ part.down.weight.T + part.down.bias) @ part.up.weight.T + part.up.bias
    torch.testing.assert_close(part(x), expected)


def test_bottlenecks_start_as_near_identities() -> None:
    part = Bottleneck(768, 64)
    for linear in (part.down, part.up):
        assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert linear.bias.detach().eq(0).all()


def test_adapters_start_near_the_frozen_encoders_and_are_them_without_their_output(tiny: ModuleType) -> None:
    _, model = tiny.build("adapter")
    items = tiny.items()
    for modality, view in model.views.items():
        frozen = encode(tiny.views()[modality], items)
        torch.testing.assert_close(encode(view, items), frozen, atol=1e-2, rtol=1e-2)
        assert not torch.equal(encode(view, items), frozen)
        for adapter in view.module.get_submodule("adapters"):
            nn.init.zeros_(adapter.up.weight)
        assert torch.equal(encode(view, items), frozen)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_adapters_stand_before_the_residual(tiny: ModuleType, modality: Modality) -> None:
    """An adapter that adds a constant is a shift of its sub-layer's output bias, before residual and norm."""
    _, model = tiny.build("adapter", modalities=(modality,))
    view, plain = model.views[modality], tiny.views((modality,))[modality]
    names = plain.projections("attention_output", "ffn_out")
    adapters = list(view.module.get_submodule("adapters"))
    assert len(names) == len(adapters) == 2 * tiny.DEPTH
    for name, adapter in zip(names, adapters, strict=True):
        shift = torch.randn(tiny.WIDTH)
        nn.init.zeros_(adapter.up.weight)
        adapter.up.bias.data.copy_(shift)
        plain.module.get_submodule(name).bias.data.add_(shift)
    items = tiny.items((modality,))
    torch.testing.assert_close(encode(view, items), encode(plain, items), **CLOSE)


# --- LoRA -----------------------------------------------------------------------------------------------------------


def test_lora_adds_a_scaled_product_to_the_pretrained_weight(tiny: ModuleType) -> None:
    _, model = tiny.build("lora", {"rank": 3, "alpha": 6})
    items = tiny.items()
    for modality, view in model.views.items():
        plain = tiny.views()[modality]
        for name in plain.projections("query", "value"):
            adapted, target = view.module.get_submodule(name), plain.module.get_submodule(name)
            assert torch.equal(adapted.base_layer.weight, target.weight)
            a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
            assert (a.shape, b.shape) == ((3, tiny.WIDTH), (tiny.WIDTH, 3))
            assert b.detach().eq(0).all()
            bound = (1 / tiny.WIDTH) ** 0.5  # Kaiming-uniform with a = sqrt(5)
            assert bound / 2 < float(a.detach().abs().max()) <= bound
            b.data.normal_()
            target.weight.data.add_(2.0 * b.detach() @ a.detach())
        torch.testing.assert_close(encode(view, items), encode(plain, items), atol=1e-4, rtol=1e-4)


def test_merged_lora_runs_without_its_matrices(tiny: ModuleType) -> None:
    method, model = tiny.build("lora")
    tiny.train(method, model, 2)
    method.prepare_inference(model)
    before = tiny.vectors(model, tiny.items())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(float("nan"))
    assert torch.equal(tiny.vectors(model, tiny.items()), before)


def test_lora_drops_out_while_it_trains(tiny: ModuleType) -> None:
    method, model = tiny.build("lora", {"dropout": 0.5})
    tiny.train(method, model, 1)
    items = tiny.items()
    model.train()
    assert not torch.equal(model.encode_items(items), model.encode_items(items))
    assert torch.equal(tiny.vectors(model, items), tiny.vectors(model, items))


# --- BitFit ---------------------------------------------------------------------------------------------------------


def test_bitfit_trains_the_biases_of_the_encoders_and_nothing_else_there(tiny: ModuleType) -> None:
    _, model = tiny.build("bitfit")
    for name, parameter in model.encoders.named_parameters():
        assert parameter.requires_grad is (name.split(".")[-1] == "bias"), name
    assert model.encoders["image"].embeddings.patch_embeddings.projection.bias.requires_grad
    assert model.encoders["text"].embeddings.LayerNorm.bias.requires_grad


# --- prompts --------------------------------------------------------------------------------------------------------


def with_prompts(plain: EncoderView, items: Items, prompts: Tensor) -> Tensor:
    """Token 0 of an encoder whose layer i reads ``prompts[i]`` behind token 0; written out, layer by layer."""
    module, length, count = plain.module, prompts.shape[1], len(items)
    mask = None
    if plain.modality == "text":
        hidden = module.embeddings(input_ids=items.tokens)
        ones = torch.ones(count, length, dtype=torch.bool)
        keys = torch.cat([items.token_mask[:, :1].bool(), ones, items.token_mask[:, 1:].bool()], dim=1)
        mask = keys[:, None, None, :]
    else:
        hidden = module.embeddings(items.image.float() / 127.5 - 1)
    first, rest = hidden[:, :1], hidden[:, 1:]
    for i, layer in enumerate(plain.layers):
        if i < len(prompts):
            middle = prompts[i].expand(count, -1, -1)
        hidden = layer(torch.cat([first, middle, rest], dim=1), mask)
        first, middle, rest = hidden[:, :1], hidden[:, 1 : 1 + length], hidden[:, 1 + length :]
    state = first[:, 0]
    return state if plain.modality == "text" else module.layernorm(state)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_prompts_stand_behind_token_0(tiny: ModuleType, modality: Modality, deep: bool) -> None:
    _, model = tiny.build("prompt", {"length": 4, "deep": deep}, (modality,))
    view, items = model.views[modality], tiny.items((modality,))
    vectors = view.module.get_submodule("prompts").vectors
    assert vectors.shape == (tiny.DEPTH if deep else 1, 4, tiny.WIDTH)
    with torch.no_grad():
        expected = with_prompts(tiny.views((modality,))[modality], items, vectors)
    torch.testing.assert_close(encode(view, items), expected, **CLOSE)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_the_sequence_grows_by_the_prompts_once(tiny: ModuleType, deep: bool) -> None:
    _, model = tiny.build("prompt", {"length": 4, "deep": deep})
    seen: dict[str, set[int]] = {"text": set(), "image": set()}
    for modality, view in model.views.items():
        for layer in view.layers:
            layer.register_forward_hook(lambda _m, _a, out, kept=seen[modality]: kept.add(out.shape[1]))
    tiny.vectors(model, tiny.items())
    assert seen == {"text": {tiny.TOKENS + 4}, "image": {1 + (tiny.SIDE // tiny.PATCH) ** 2 + 4}}


def test_prompts_stand_at_the_input_of_the_first_layer_where_embeddings_are_narrower(tiny: ModuleType) -> None:
    """An ELECTRA's are projected to the layers' width."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": tiny.VOCAB}
    module = ElectraModel(ElectraConfig(embedding_size=8, hidden_size=tiny.WIDTH, **sizes)).eval()
    view = EncoderView(module, "text")
    sequence = nn.Identity()
    model = Recommender({"text": view}, TokenFusion({"text": view.shape}, tiny.DIM), sequence, frozen=())
    create("prompt", {"length": 4}).adapt(model, tiny.schedule())
    items = tiny.items(("text",))
    reads = Reads((0,), tokens="all")
    states = view.encode(reads, tokens=items.tokens, token_mask=items.token_mask).states
    assert states.shape == (len(items), 1, tiny.TOKENS + 4, tiny.WIDTH)
    assert torch.equal(states[3, 0, 1:5], view.module.get_submodule("prompts").vectors[0])


def test_prompts_start_uniformly_within_vpts_bound(tiny: ModuleType) -> None:
    _, model = tiny.build("prompt", {"length": 50})
    bounds = {"text": (6 / (2 * tiny.WIDTH)) ** 0.5, "image": (6 / (3 * tiny.PATCH**2 + tiny.WIDTH)) ** 0.5}
    for modality, bound in bounds.items():
        largest = float(model.views[modality].module.get_submodule("prompts").vectors.detach().abs().max())
        assert 0.95 * bound < largest <= bound


# --- IISAN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "levels"),
    [
        (12, (0, 2, 4, 6, 8, 10, 12)),
        (6, (0, 2, 4, 6)),
        (4, (0, 2, 4)),
        (2, (0, 2)),
        (5, (0, 1, 3, 5)),
        (1, (0, 1)),
    ],
)
def test_side_networks_read_every_second_level_back_from_the_last(depth: int, levels: tuple[int, ...]) -> None:
    assert side_levels(depth) == levels


def network(text: EncoderShape, image: EncoderShape, **options: object) -> SideNetwork:
    method = IISAN(SideConfig.model_validate(options))
    return method.item_encoder(TaskShape(8, 10, {"text": text, "image": image}))


def test_gates_start_half_open_and_follow_their_temperature() -> None:
    tower = network(EncoderShape(16, 4), EncoderShape(16, 4), temperature=0.2).towers["image"]
    assert tower.gate_values().tolist() == [0.5, 0.5, 0.5]
    nn.init.constant_(tower.gates, 0.1)
    torch.testing.assert_close(tower.gate_values(), torch.full((3,), 0.5).logit().add(0.5).sigmoid())


def test_the_towers_written_out() -> None:
    side = network(EncoderShape(16, 4), EncoderShape(16, 4), bottleneck=3)
    image, text = torch.randn(5, 3, 16), torch.randn(5, 3, 16)
    for tower in side.towers.values():
        nn.init.normal_(tower.gates)
        for block in tower.blocks:
            nn.init.normal_(block.up.weight)
    intra, inter = side.towers["text"], side.towers["inter"]
    s = z = torch.zeros(5, 16)
    for k in range(3):
        g, h = intra.gate_values()[k], inter.gate_values()[k]
        s = intra.blocks[k](g * text[:, k] + (1 - g) * s)
        z = inter.blocks[k](z + h * image[:, k] + (1 - h) * text[:, k])
    torch.testing.assert_close(intra(text), s, **CLOSE)
    torch.testing.assert_close(inter(image, text), z, **CLOSE)


@pytest.mark.parametrize("text", [EncoderShape(32, 4), EncoderShape(16, 6)], ids=["width", "depth"])
def test_encoders_that_differ_need_the_inter_tower_off(text: EncoderShape) -> None:
    with pytest.raises(UserError, match=r"inter tower needs encoders of equal width and depth; text has . layers of"):
        network(text, EncoderShape(16, 4))
    side = network(text, EncoderShape(16, 4), inter=False)
    states = {"text": torch.randn(3, len(side_levels(text.depth)), text.width), "image": torch.randn(3, 3, 16)}
    assert side(states, torch.arange(3)).shape == (3, 8)


def test_the_inter_tower_alone_needs_both_modalities(tiny: ModuleType) -> None:
    with pytest.raises(UserError, match="intra = false needs a text and an image encoder; this cell has one"):
        tiny.build("iisan", {"intra": False}, ("text",))


def test_nothing_flows_back_into_the_encoders(tiny: ModuleType) -> None:
    _, model = tiny.build("iisan")
    tiny.loss_of(model.train(), tiny.batch()).backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.encoders.parameters())


# --- rows that adapt nothing ----------------------------------------------------------------------------------------


def test_item_ids_look_up_a_table_whose_padding_is_zero() -> None:
    table = ItemTable(items=9, dim=4)
    ids = torch.tensor([3, 0, 9])
    assert torch.equal(table({}, ids), table.table.weight[ids])
    assert table.table.weight[0].eq(0).all()
    assert float(table.table.weight[1:].detach().std()) == pytest.approx(0.02, rel=0.4)


def test_popularity_ranks_by_training_popularity(tiny: ModuleType) -> None:
    _, model = tiny.build("popularity")
    data = tiny.catalogue()
    vectors = item_matrix(model.eval().encode_items, tiny.store(data, ()), torch.device("cpu"))
    users = model.user_vectors(vectors[torch.ones(12, 5, dtype=torch.int64)], torch.ones(12, 5, dtype=torch.bool))
    target = torch.arange(1, 13)
    ranks = rank_targets(users[:, -1], vectors, target, torch.zeros(12, 1, dtype=torch.int64))
    popularity = data.popularity[1:]
    assert ranks.tolist() == [(popularity >= own).sum() for own in popularity]
    np.testing.assert_allclose(vectors[1:, 0].numpy(), popularity, rtol=1e-6)
    assert model.parameter_groups() == {}
