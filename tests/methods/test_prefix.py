"""Prefix tuning: the formula written out, who attends to what, the MLP and what is left of it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpme.bench.contract.small_encoders import small_encoder
from tpme.bench.counting.encoding import item_flops
from tpme.bench.counting.meta import MetaEncoders
from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import TaskShape, fusion_parameters
from tpme.methods.parts.attention import extend_attention
from tpme.methods.prefix import Prefix, PrefixConfig, prefixes
from tpme.methods.registry import create

DIRECT = {"length": 3}
THROUGH_MLP = {"length": 3, "reparameterised": True, "hidden": 5}
BOTH_FORMS = pytest.mark.parametrize("options", [DIRECT, THROUGH_MLP], ids=["direct", "mlp"])


def states(view: EncoderView, items: Items, level: int = 2) -> Tensor:
    reads = Reads((level,), tokens="all")
    with torch.no_grad():
        given = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
        every = view.encode(reads, **given)
    return every.states[:, 0][every.mask]


def amplified(model: Recommender) -> Recommender:
    """Keys and values of a size that matters."""
    for prefix in prefixes(model).values():
        for parameter in prefix.parameters():
            nn.init.normal_(parameter, std=0.7)
    return model


class Written:
    """The attention of every layer, with further keys and values in its softmax, written out per item."""

    def __init__(self, view: EncoderView, tables: list[Tensor]) -> None:
        self.tables = tables
        for layer, module in enumerate(view.layers):
            core = module.attention.self if view.modality == "text" else module.attention
            core.forward = self.forward(layer, core, view)

    def forward(self, layer: int, core: Any, view: EncoderView) -> Any:
        query, key, value = (
            view.module.get_submodule(view.projections(role)[layer]) for role in ("query", "key", "value")
        )

        def run(hidden: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
            results = []
            for n, states_of_item in enumerate(hidden):
                kept = torch.ones(len(states_of_item), dtype=torch.bool)
                if attention_mask is not None:
                    kept = attention_mask[n, 0, 0]
                heads = []
                for head, (own_key, own_value) in enumerate(zip(*self.tables[layer], strict=True)):
                    width = own_key.shape[1]
                    part = slice(head * width, (head + 1) * width)
                    keys = torch.cat([own_key, key(states_of_item[kept])[:, part]])
                    values = torch.cat([own_value, value(states_of_item[kept])[:, part]])
                    scores = query(states_of_item)[:, part] @ keys.T / width**0.5
                    heads.append(scores.softmax(dim=1) @ values)
                results.append(torch.cat(heads, dim=1))
            result = torch.stack(results)
            return (result if view.modality == "text" else core.o_proj(result)), None

        return run


@BOTH_FORMS
@pytest.mark.parametrize("modality", ["text", "image"])
def test_every_query_attends_to_the_prefix_and_to_its_item(
    tiny: ModuleType, modality: Modality, options: dict[str, Any]
) -> None:
    """``softmax(q [P_K; K]^T / sqrt(d_h)) [P_V; V]``, padding left out."""
    _, model = tiny.build("prefix", options, (modality,))
    view, plain = amplified(model).views[modality], tiny.views((modality,))[modality]
    tables = view.module.get_submodule("prefix").tables()
    assert [table.shape for table in tables] == [(2, tiny.HEADS, 3, tiny.WIDTH // tiny.HEADS)] * tiny.DEPTH
    items = tiny.items((modality,))
    frozen = states(plain, items)
    Written(plain, tables)
    torch.testing.assert_close(states(view, items), states(plain, items), atol=1e-5, rtol=1e-4)
    assert (states(view, items) - frozen).abs().max() > 0.1


@torch.no_grad()
def test_key_value_heads_may_be_shared_and_attention_causal() -> None:
    """Llama: a token depends on no later one, but on the prefix."""
    view = EncoderView(small_encoder("llama"), "text")
    model = Recommender({"text": view}, nn.Identity(), nn.Identity(), frozen=())  # type: ignore[arg-type]
    create("prefix", DIRECT).adapt(model, None)  # type: ignore[arg-type]
    assert prefixes(model)["encoders.text.prefix"].vectors(0).shape == (2, 1, 3, 8)
    words, mask = torch.arange(3, 12)[None], torch.ones(1, 9, dtype=torch.int64)
    reads = Reads(final=True, pool="mean", tokens="all")
    before = view.encode(reads, tokens=words, token_mask=mask).states[0, 0]
    words[0, -1] = 40
    changed = view.encode(reads, tokens=words, token_mask=mask).states[0, 0]
    assert torch.equal(changed[:-1], before[:-1])
    assert not torch.allclose(changed[-1], before[-1], atol=1e-3)
    amplified(model)
    assert not torch.allclose(view.encode(reads, tokens=words, token_mask=mask).states[0, 0, 0], before[0], atol=1e-2)


def test_zero_keys_and_values_are_not_the_identity_and_an_unextended_encoder_is(tiny: ModuleType) -> None:
    """Zero keys still take a share of the softmax."""
    _, model = tiny.build("prefix", DIRECT)
    items = tiny.items()
    for modality, view in model.views.items():
        frozen = states(tiny.views()[modality], items)
        for table in view.module.get_submodule("prefix").parameters():
            nn.init.zeros_(table)
        assert not torch.allclose(states(view, items), frozen, atol=1e-3)
        for part in view.module.modules():
            vars(part).pop("_tpme_attention_changes", None)
        torch.testing.assert_close(states(view, items), frozen)


def test_tokens_keep_their_number_and_their_positions(tiny: ModuleType) -> None:
    """The layers get what they got before; peft's prefix tuning shifts the positions of a BERT."""
    _, model = tiny.build("prefix", DIRECT)
    amplified(model)
    items = tiny.items()
    for modality, view in model.views.items():
        plain = tiny.views()[modality]
        assert torch.equal(states(view, items, 0), states(plain, items, 0))
        assert states(view, items).shape == states(plain, items).shape


@BOTH_FORMS
def test_only_the_prefix_trains_in_the_encoders(tiny: ModuleType, options: dict[str, Any]) -> None:
    method, model = tiny.build("prefix", options)
    tiny.train(method, model, 1)
    trains = {name for name, value in model.encoders.named_parameters() if value.requires_grad}
    assert trains == {name for name, _ in model.encoders.named_parameters() if ".prefix." in f".{name}"}
    tiny.loss_of(amplified(model).train(), tiny.batch()).backward()
    gradients = tiny.gradients(model.encoders)
    assert gradients.keys() == trains
    assert all(value.abs().max() > 0 for value in gradients.values())


def test_the_mlp_makes_the_tables(tiny: ModuleType) -> None:
    view = tiny.views(("text",))["text"]
    prefix = Prefix(view, PrefixConfig(**THROUGH_MLP))
    made = prefix.encoder
    assert made is not None
    hidden = torch.tanh(made.table @ made.inner.weight.T + made.inner.bias)
    for layer, table in enumerate(prefix.tables()):
        flat = hidden @ made.outer[layer].weight.T + made.outer[layer].bias
        for kind in range(2):
            for head in range(tiny.HEADS):
                width = tiny.WIDTH // tiny.HEADS
                first = kind * tiny.WIDTH + head * width
                torch.testing.assert_close(table[kind, head], flat[:, first : first + width].detach())


def test_neither_the_stored_state_nor_inference_has_the_mlp(tiny: ModuleType) -> None:
    method, model = tiny.build("prefix", THROUGH_MLP)
    tiny.train(method, model, 2)
    before, state = tiny.vectors(model, tiny.items()), method.state(model)
    stored = {name: value.shape for name, value in state.items() if name.startswith("encoders.")}
    shape = (2, tiny.HEADS, 3, tiny.WIDTH // tiny.HEADS)
    assert stored == {f"encoders.{m}.prefix.layers.{i}": shape for m in ("text", "image") for i in range(tiny.DEPTH)}
    fresh_method, fresh = tiny.build("prefix", THROUGH_MLP, seed=5)
    fresh_method.load_state(fresh, state)
    assert torch.equal(tiny.vectors(fresh, tiny.items()), before)
    dear, _ = item_flops(model.encode_items, tiny.items())
    method.prepare_inference(model)
    assert torch.equal(tiny.vectors(model, tiny.items()), before)
    cheap, _ = item_flops(model.encode_items, tiny.items())
    assert cheap < dear
    assert not any("prefix.encoder" in name for name, _ in model.named_parameters())


def test_prefixes_follow_other_changes_of_the_attention(tiny: ModuleType) -> None:
    """A change that comes later sees the prefix among the keys."""
    _, model = tiny.build("prefix", DIRECT)
    keys: list[int] = []

    def count(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        keys.append(key.shape[2])
        return query, key, value, mask

    extend_attention(model.views["text"], 0, count)
    tiny.vectors(model, tiny.items())
    assert keys == [tiny.TOKENS + 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"length": 20}, 368_640),
        ({"length": 20, "reparameterised": True}, 9_864_704),
        ({}, 294_912),
        ({"reparameterised": True}, 9_861_632),
    ],
)
def test_numbers_at_the_base_shape(options: dict[str, Any], expected: int) -> None:
    encoders = MetaEncoders()
    sources: dict[Modality, str] = {"text": "bert-base-uncased", "image": "google/vit-base-patch16-224"}
    for modality, source in sources.items():
        views = {modality: encoders.view(EncoderSpec(source=source), modality)}
        task = TaskShape(64, 10, {modality: views[modality].shape})
        method = create("prefix", options)
        assert method.trainable_parameters(task, views) - fusion_parameters(task) == expected
