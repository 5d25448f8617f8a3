"""DAPT: gates, prompts and transforms, against layers written out by hand; folding; what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.errors import UserError
from tpme.bench.record import Modality, Training
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import ModelBuilder
from tpme.methods.base import Method
from tpme.methods.dapt import DynamicAdapter, ScaleShift
from tpme.methods.registry import create

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BOTH: tuple[Modality, ...] = ("text", "image")
DEPTH = 3
REFUSED = ("llama", "modernbert")


def build(tiny: ModuleType, family: str, attention: str | None = None, **options: Any) -> tuple[Method, Recommender]:
    """DAPT on an encoder of three layers; everything that starts at zero is moved off it."""
    method, modality = create("dapt", {"dropout": 0.0} | options), modality_of(family)
    module = small_encoder(family, depth=DEPTH)
    if attention is not None:
        module.set_attn_implementation(attention)
    view = EncoderView(module, modality, attention=attention)
    torch.manual_seed(3)
    training = Training(embedding_dim=tiny.DIM, heads=tiny.HEADS, dropout=0.0)
    model = ModelBuilder(method, training, tiny.data_size(), {modality: view.shape}).build({modality: view})
    for adapter in adapters_of(model, modality):
        for value in (adapter.gate.bias, adapter.down.bias, adapter.up.weight, adapter.up.bias):
            nn.init.normal_(value, std=0.5)
    return method, model


def adapters_of(model: Recommender, modality: Modality) -> list[DynamicAdapter]:
    return list(model.views[modality].module.get_submodule("dapt"))


def states(model: Recommender, modality: Modality, inputs: Items, **settings: Any) -> Any:
    """The last states that an encoder's item is read of."""
    given = {"tokens": inputs.tokens, "token_mask": inputs.token_mask, "image": inputs.image}
    view = model.eval().views[modality]
    with torch.no_grad():
        return view.encode(Reads(final=True, pool=view.shape.pool, **settings), **given)


# --- what it computes -----------------------------------------------------------------------------------------------


class ByHand:
    """An encoder with DAPT, written out: ``operation(name, x)`` is T behind an operation of the plain encoder."""

    def __init__(self, plain: nn.Module, adapted: nn.Module) -> None:
        self.plain, self.adapted = plain, adapted
        self.adapters: Any = adapted.get_submodule("dapt")

    def operation(self, name: str, x: Tensor) -> Tensor:
        t: Any = self.adapted.get_submodule(name).tfts
        return self.plain.get_submodule(name)(x) * t.weight + t.bias

    def attention(self, names: tuple[str, str, str], x: Tensor, kept: Tensor) -> Tensor:
        q, k, v = (self.operation(name, x).unflatten(2, (2, -1)).transpose(1, 2) for name in names)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~kept[:, None, None], float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def change(self, i: int, u: Tensor) -> Tensor:
        a = self.adapters[i]
        v = functional.layer_norm(u, u.shape[-1:], a.norm.weight, a.norm.bias)
        gate = torch.relu(v @ a.gate.weight.T + a.gate.bias)
        return gate * a.up(functional.gelu(a.down(v)))

    def prompt(self, i: int, change: Tensor, kept: Tensor) -> Tensor:
        rows = [functional.gelu(row)[real].mean(0) for row, real in zip(change, kept, strict=True)]
        a = self.adapters[i]
        return (torch.stack(rows) * a.prompt.weight + a.prompt.bias)[:, None]

    def bert(self, inputs: Items) -> Tensor:
        kept = inputs.token_mask.bool()
        tables = self.plain.embeddings
        x = tables.word_embeddings(inputs.tokens) + tables.token_type_embeddings.weight[0]
        x = self.operation("embeddings.LayerNorm", x + tables.position_embeddings.weight[: x.shape[1]])
        for i in range(DEPTH):
            layer = f"encoder.layer.{i}"
            own = f"{layer}.attention.self"
            mixed = self.attention((f"{own}.query", f"{own}.key", f"{own}.value"), x, kept)
            mixed = self.operation(f"{layer}.attention.output.dense", mixed)
            u = self.operation(f"{layer}.attention.output.LayerNorm", x + mixed)
            inner = functional.gelu(self.operation(f"{layer}.intermediate.dense", u))
            change = self.change(i, u)
            norm = f"{layer}.output.LayerNorm"
            x = self.operation(norm, u + self.operation(f"{layer}.output.dense", inner) + change)
            if i < DEPTH - 1:
                prompt = self.operation(norm, self.prompt(i, change, kept))
                x, kept = torch.cat([x[:, :1], prompt, x[:, 1:]], 1), torch.cat([kept[:, :1], kept], 1)
        return x

    def vit(self, inputs: Items) -> Tensor:
        embeddings, name = self.plain.embeddings, "embeddings.patch_embeddings.projection"
        t: Any = self.adapted.get_submodule(name).tfts
        patches = self.plain.get_submodule(name)(inputs.image.float() / 127.5 - 1)
        patches = patches.flatten(2).transpose(1, 2) * t.weight + t.bias
        x = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], 1) + embeddings.position_embeddings
        for i in range(DEPTH):
            layer = f"layers.{i}"
            y = self.operation(f"{layer}.layernorm_before", x)
            names = tuple(f"{layer}.attention.{part}_proj" for part in "qkv")
            mixed = self.attention(names, y, torch.ones(x.shape[:2], dtype=torch.bool))
            x = x + self.operation(f"{layer}.attention.o_proj", mixed)
            u = self.operation(f"{layer}.layernorm_after", x)
            inner = functional.gelu(self.operation(f"{layer}.mlp.fc1", u))
            change = self.change(i, u)
            x = x + self.operation(f"{layer}.mlp.fc2", inner) + change
            if i < DEPTH - 1:
                prompt = self.prompt(i, change, torch.ones(x.shape[:2], dtype=torch.bool))
                x = torch.cat([x[:, :1], prompt, x[:, 1:]], 1)
        return self.operation("layernorm", x)


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
@pytest.mark.parametrize(("family", "run"), [("bert", ByHand.bert), ("vit", ByHand.vit)])
def test_it_is_the_layers_written_out(
    tiny: ModuleType, family: str, run: Callable[[ByHand, Items], Tensor], attention: str | None
) -> None:
    """Also: token 0 stays token 0, the sequence grows by a token in all layers but the last, prompts are not read."""
    _, model = build(tiny, family, attention, tfts_noise=0.3)
    modality = modality_of(family)
    inputs = tiny.items((modality,))
    with torch.no_grad():
        expected = run(ByHand(small_encoder(family, depth=DEPTH), model.views[modality].module), inputs)
    found = states(model, modality, inputs, tokens="all")
    tokens = inputs.tokens.shape[1] if inputs.tokens is not None else (tiny.SIDE // 16) ** 2 + 1
    assert found.states.shape[2] == expected.shape[1] == tokens + DEPTH - 1
    real = torch.ones(expected.shape[:2], dtype=torch.bool)
    if inputs.token_mask is not None:
        real[:, DEPTH:] = inputs.token_mask[:, 1:].bool()
    torch.testing.assert_close(found.states[:, 0][real], expected[real], **CLOSE)
    real[:, 1:DEPTH] = False
    assert torch.equal(found.mask, real)
    torch.testing.assert_close(states(model, modality, inputs)[:, 0], expected[:, 0], **CLOSE)


def test_without_noise_and_prompts_it_starts_as_the_frozen_encoders(tiny: ModuleType) -> None:
    inputs = tiny.items()
    _, frozen = tiny.build("frozen")
    plain = tiny.vectors(frozen, inputs)
    _, exact = tiny.build("dapt", {"prompts": False, "tfts_noise": 0.0})
    assert torch.equal(tiny.vectors(exact, inputs), plain)
    for options in ({"prompts": False}, {"tfts_noise": 0.0}):
        _, other = tiny.build("dapt", options)
        assert not torch.allclose(tiny.vectors(other, inputs), plain, atol=1e-4)


def test_gates_are_one_non_negative_number_a_token(tiny: ModuleType) -> None:
    """A token's change depends on that token alone, and is zero where its gate is closed."""
    torch.manual_seed(0)
    _, model = build(tiny, "vit")
    adapter = adapters_of(model, "image")[0].eval()
    nn.init.normal_(adapter.gate.weight)
    u = torch.randn(4, 7, tiny.WIDTH)
    gates = torch.relu(adapter.gate(adapter.norm(u)))
    assert gates.shape == (4, 7, 1)
    assert len({round(gate, 5) for gate in gates.flatten().tolist()}) > 8
    change = adapter(u, None)
    torch.testing.assert_close(adapter(u[1:2, 3:5], None), change[1:2, 3:5], **CLOSE)
    closed = gates[..., 0] == 0
    assert 0 < int(closed.sum()) < 28
    assert torch.equal(change.eq(0).all(-1), closed)


def test_gradients_reach_the_gate_after_the_first_step(tiny: ModuleType) -> None:
    """W_up starts at zero, so only it learns in the first step; then everything does."""
    method, model = tiny.build("dapt", {"dropout": 0.0})
    for step in range(2):
        model.zero_grad()
        tiny.loss_of(model.train(), tiny.batch()).backward()
        for modality in BOTH:
            for adapter in adapters_of(model, modality):
                assert adapter.up.weight.grad.abs().sum() > 0
                for value in (adapter.gate.weight, adapter.down.weight):
                    assert bool(value.grad.abs().sum() > 0) is (step == 1)
        tiny.train(method, model, 1)


@pytest.mark.parametrize("options", [{}, {"gate_bias": 0.0}])
def test_gates_start_at_their_bias(tiny: ModuleType, options: dict[str, float]) -> None:
    _, model = tiny.build("dapt", options)
    for modality in BOTH:
        for adapter in adapters_of(model, modality):
            assert adapter.gate.bias.tolist() == [options.get("gate_bias", 1.0)]


def test_prompts_depend_on_the_item_once_the_adapter_has_learnt(tiny: ModuleType) -> None:
    method, model = tiny.build("dapt", {"dropout": 0.0})
    found: dict[Modality, Tensor] = {}

    def keep(modality: Modality) -> Callable[..., None]:
        return lambda _module, _args, output: found.update({modality: output[:, 1]})

    for modality in BOTH:
        model.views[modality].layers[0].register_forward_hook(keep(modality))
    tiny.vectors(model, tiny.items())
    for prompts in found.values():
        assert torch.equal(prompts, prompts[:1].expand_as(prompts))
    tiny.train(method, model, 3)
    tiny.vectors(model, tiny.items())
    for prompts in found.values():
        assert (prompts - prompts[0]).abs().amax(1)[1:].min() > 1e-6


def test_padding_is_no_part_of_a_prompt(tiny: ModuleType) -> None:
    _, model = build(tiny, "bert", tfts_noise=0.3)
    torch.manual_seed(1)
    tokens, lengths = torch.randint(3, 50, (5, 16)), torch.tensor([12, 13, 14, 15, 16])
    mask = (torch.arange(16) < lengths[:, None]).long()
    ids = torch.arange(1, 6)
    zeros = states(model, "text", Items(ids, tokens=tokens * mask, token_mask=mask))
    torch.testing.assert_close(states(model, "text", Items(ids, tokens=tokens, token_mask=mask)), zeros, **CLOSE)
    for row, length in enumerate(lengths.tolist()):
        one = Items(ids[:1], tokens=tokens[row : row + 1, :length], token_mask=mask[row : row + 1, :length])
        torch.testing.assert_close(states(model, "text", one), zeros[row : row + 1], **CLOSE)


def test_a_transform_has_the_gradients_of_scale_and_shift_and_keeps_its_result(tiny: ModuleType) -> None:
    torch.manual_seed(0)
    x, gamma, beta = (torch.randn(*size, dtype=torch.double, requires_grad=True) for size in ((2, 3, 4), (4,), (4,)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        z = ScaleShift.apply(x, gamma, beta)
    torch.testing.assert_close(z, gamma * x + beta)
    assert [value.numel() for value in kept] == [24, 4, 4]
    assert kept[0].data_ptr() == z.data_ptr()
    assert torch.autograd.gradcheck(ScaleShift.apply, (x, gamma, beta))


def test_the_gradient_of_a_scale_of_zero_is_finite() -> None:
    x, beta = torch.randn(2, 3, 4), torch.randn(4, requires_grad=True)
    gamma = torch.tensor([0.0, 1e-12, -1e-12, 0.5], requires_grad=True)
    ScaleShift.apply(x, gamma, beta).square().sum().backward()
    assert gamma.grad.abs().max() < 1e2
    expected = (2 * (0.5 * x[..., 3] + beta[3]) * x[..., 3]).sum()
    torch.testing.assert_close(gamma.grad[3], expected.detach(), **CLOSE)


# --- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_transforms_fold_into_the_weights(tiny: ModuleType, family: str) -> None:
    """Exactly, into the encoder's own kinds of modules, whichever of them have biases; prompts and adapters stay."""
    method, model = build(tiny, family, tfts_noise=0.3)
    modality = modality_of(family)
    inputs = tiny.items((modality,))
    before, folded = states(model, modality, inputs), copy.deepcopy(model)
    method.prepare_inference(folded)
    torch.testing.assert_close(states(folded, modality, inputs), before, **CLOSE)
    fresh = EncoderView(small_encoder(family, depth=DEPTH), modality)
    plain = {name: type(part) for name, part in fresh.module.named_modules()}
    module = folded.views[modality].module
    assert not [name for name, part in module.named_modules() if name in plain and type(part) is not plain[name]]
    assert not [name for name, _ in module.named_parameters() if "tfts" in name]
    assert [name for name, _ in model.named_parameters() if "tfts" in name]
    torch.testing.assert_close(states(model, modality, inputs), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_other_items_and_longer_padding_change_nothing(tiny: ModuleType, family: str) -> None:
    _, model = build(tiny, family, tfts_noise=0.3)
    modality = modality_of(family)
    inputs = tiny.items((modality,))
    together = states(model, modality, inputs)
    for row, item in enumerate(inputs.ids.tolist()):
        alone = states(model, modality, tiny.items((modality,), [item]))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)
    if inputs.tokens is not None:
        longer = replace(
            inputs,
            tokens=functional.pad(inputs.tokens, (0, 4), value=9),
            token_mask=functional.pad(inputs.token_mask, (0, 4)),
        )
        torch.testing.assert_close(states(model, modality, longer), together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_encoders_whose_norms_have_no_bias_are_refused(tiny: ModuleType, family: str) -> None:
    with pytest.raises(UserError, match=r"method 'dapt': the norms of .* have no bias") as error:
        build(tiny, family)
    assert "\n" not in str(error.value)


# --- counters and options -------------------------------------------------------------------------------------------


def test_it_reports_the_share_of_closed_gates(tiny: ModuleType) -> None:
    """Of the tokens that are no padding, in the last training step; closed gates of one layer show in the maximum."""
    method, model = build(tiny, "bert")
    assert method.report(model) == {}
    first, second, third = adapters_of(model, "text")
    for adapter, bias in ((first, -1.0), (second, 1.0), (third, 1.0)):
        nn.init.zeros_(adapter.gate.weight)
        nn.init.constant_(adapter.gate.bias, bias)
    model.train().encode_items(tiny.items(("text",)))
    assert method.report(model) == pytest.approx({"text_zero_gates": 1 / 3, "text_zero_gates_max": 1.0})
    nn.init.normal_(third.gate.weight, std=3.0)
    nn.init.zeros_(third.gate.bias)
    read: list[Tensor] = []
    third.norm.register_forward_hook(lambda _module, _args, v: read.append(v))
    inputs = tiny.items(("text",))
    model.encode_items(inputs)
    mask = torch.cat([torch.ones(len(inputs), DEPTH - 1), inputs.token_mask], 1).bool()
    closed = (third.gate(read[0])[..., 0] <= 0)[mask].float().mean()
    assert 0 < float(closed) < 1
    assert third.closed is not None
    assert float(third.closed[0] / third.closed[1]) == pytest.approx(float(closed))


@pytest.mark.parametrize("options", [{"bottleneck": 0}, {"dropout": 1.0}, {"gate_bias": -1.0}, {"tfts_noise": -0.1}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"method 'dapt', option '{next(iter(options))}'"):
        create("dapt", options)
