from __future__ import annotations

import copy
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from tpme.bench.contract.small_encoders import small_encoder
from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.items import Reads
from tpme.bench.task.view import EncoderView

ROLES: tuple[Role, ...] = tuple(role for role in get_args(Role) if role != "ffn_gate")


class FusedGate(nn.Module):
    """The feed-forward part of the largest DINOv2 until transformers 5.17: gate and input in one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights_in, self.weights_out = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.weights_in(hidden).chunk(2, dim=-1)
        return self.weights_out(nn.functional.silu(gate) * up)


def dinov2_until_5_17() -> nn.Module:
    """A gated DINOv2 with the names it had until transformers 5.17."""
    module = small_encoder("dinov2")
    for layer in module.encoder.layer:
        layer.mlp = FusedGate()
        if not hasattr(layer.attention, "q_proj"):
            continue
        old, inner, output = nn.Module(), nn.Module(), nn.Module()
        for new, name in {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.items():
            inner.add_module(name, layer.attention.get_submodule(new))
        output.add_module("dense", layer.attention.o_proj)
        old.add_module("attention", inner)
        old.add_module("output", output)
        layer.attention = old
    return module


# --- where things are -----------------------------------------------------------------------------------------------


def test_roles_of_bert(tiny: ModuleType) -> None:
    view = tiny.views(("text",))["text"]
    assert view.projections("query", "ffn_out") == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.output.dense",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.output.dense",
    ]
    layer = view.layers[1]
    assert view.sublayer_outputs(1) == (layer.attention.output.dropout, layer.output.dropout)


def test_roles_of_vit(tiny: ModuleType) -> None:
    view = tiny.views(("image",))["image"]
    assert view.projections("value", "attention_output") == [
        "layers.0.attention.v_proj",
        "layers.0.attention.o_proj",
        "layers.1.attention.v_proj",
        "layers.1.attention.o_proj",
    ]
    layer = view.layers[0]
    assert view.sublayer_outputs(0) == (layer.attention.o_proj, layer.mlp.fc2)


def test_roles_of_a_dinov2_with_the_names_of_an_older_transformers() -> None:
    view = EncoderView(dinov2_until_5_17(), "image")
    old = ("attention.attention.query", "attention.attention.value", "attention.output.dense")
    assert view.projections("query", "value", "attention_output") == [
        f"encoder.layer.{i}.{path}" for i in range(2) for path in old
    ]


def test_the_gate_of_a_dinov2_of_an_older_transformers_is_a_layer_of_its_own() -> None:
    module: Any = dinov2_until_5_17()
    hidden = torch.randn(3, 16)
    before = module.encoder.layer[1].mlp(hidden)
    view = EncoderView(module, "image")
    mlp: Any = view.layers[1].mlp
    assert view.ffn_width == 24
    gate, up = (module.get_submodule(view.projections(role)[1])(hidden) for role in ("ffn_gate", "ffn_in"))
    torch.testing.assert_close(mlp(hidden), before)
    torch.testing.assert_close(mlp.weights_out(nn.functional.silu(gate) * up), before)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_every_role_is_a_linear_layer_of_the_right_shape(tiny: ModuleType, modality: Modality) -> None:
    view = tiny.views((modality,))[modality]
    shapes = {"ffn_in": (tiny.FFN, tiny.WIDTH), "ffn_out": (tiny.WIDTH, tiny.FFN)}
    for role in ROLES:
        names = view.projections(role)
        assert len(names) == tiny.DEPTH
        for name in names:
            assert view.module.get_submodule(name).weight.shape == shapes.get(role, (tiny.WIDTH, tiny.WIDTH))


def test_an_unknown_encoder_is_refused_in_one_line() -> None:
    module = nn.Linear(4, 4)
    module.config = SimpleNamespace(model_type="resnet")
    with pytest.raises(UserError, match=r"^encoders of model type 'resnet' are not supported; choose one of bert") as e:
        EncoderView(module, "image")
    assert "\n" not in str(e.value)


def test_an_unknown_role_is_refused_in_one_line(tiny: ModuleType) -> None:
    view = tiny.views(("text",))["text"]
    with pytest.raises(UserError, match=r"^BertModel \(text encoder\), layer 0: it has no 'ffn_gate'; leave") as e:
        view.projections("ffn_gate")
    assert "\n" not in str(e.value)


# --- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_encode_gives_token_0_of_the_hidden_states(tiny: ModuleType, modality: Modality, grad: bool) -> None:
    view, items = tiny.views((modality,))[modality], tiny.items((modality,))
    if modality == "text":
        inputs = {"input_ids": items.tokens, "attention_mask": items.token_mask}
    else:
        inputs = {"pixel_values": items.image.float() / 127.5 - 1}
    with torch.set_grad_enabled(grad):
        output = view.module(**inputs, output_hidden_states=True)
        given = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
        every = view.encode(Reads((0, 1, 2), final=True), **given)
        some = view.encode(Reads((2, 0)), **given)
    assert every.shape == (len(items), 4, tiny.WIDTH)
    for level in range(3):
        torch.testing.assert_close(every[:, level], output.hidden_states[level][:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(every[:, 3], output.last_hidden_state[:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(some, every[:, [2, 0]])
    assert every.requires_grad is grad


def test_encode_leaves_no_hook_behind(tiny: ModuleType) -> None:
    view, items = tiny.views(("text",))["text"], tiny.items(("text",))
    view.encode(Reads((0, 1)), tokens=items.tokens, token_mask=items.token_mask)
    with pytest.raises(IndexError):  # nor when the encoder fails
        view.encode(Reads((0, 1)), tokens=items.tokens + tiny.VOCAB, token_mask=items.token_mask)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in view.module.modules())


def test_the_final_state_of_a_vit_is_after_its_norm_and_of_a_bert_is_the_last_level(tiny: ModuleType) -> None:
    items, views = tiny.items(), tiny.views()
    given = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
    text = views["text"].encode(Reads((2,), final=True), **given)
    image = views["image"].encode(Reads((2,), final=True), **given)
    assert torch.equal(text[:, 0], text[:, 1])
    torch.testing.assert_close(views["image"].module.layernorm(image[:, 0]), image[:, 1])


def test_images_are_normalised_per_channel(tiny: ModuleType) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    view = EncoderView(tiny.encoder("image"), "image", mean, std)
    image = tiny.items(("image",)).image
    channels = [(image[:, c].float() / 255 - mean[c]) / std[c] for c in range(3)]
    expected = view.module(pixel_values=torch.stack(channels, dim=1)).last_hidden_state[:, 0]
    torch.testing.assert_close(view.encode(Reads(final=True), image=image)[:, 0], expected, atol=1e-5, rtol=1e-5)


# --- modes ----------------------------------------------------------------------------------------------------------


def own_modes(model: Any) -> set[bool]:
    """Modes of the modules that came with the encoders."""
    return {part.training for view in model.views.values() for part in _own(view)}


def injected_modes(model: Any) -> set[bool]:
    """Modes of the modules that a method put into the encoders."""
    own = {part for view in model.views.values() for part in _own(view)}
    return {part.training for part in model.encoders.modules() if part not in own and part is not model.encoders}


def _own(view: EncoderView) -> list[nn.Module]:
    injected = ("lora", "adapters", "prompts")
    return [
        part
        for name, part in view.module.named_modules()
        if type(part).__module__.startswith(("torch.", "transformers.")) and not any(word in name for word in injected)
    ]


@pytest.mark.parametrize(
    ("method", "own", "injected"),
    [
        ("fft", {True}, set()),
        ("bitfit", {False}, set()),
        ("lora", {False}, {True}),
        ("adapter", {False}, {True}),
        ("prompt", {False}, {True}),
        ("frozen", {False}, set()),
        ("iisan", {False}, set()),
    ],
)
def test_mode_policy(tiny: ModuleType, method: str, own: set[bool], injected: set[bool]) -> None:
    _, model = tiny.build(method)
    model.train()
    assert (own_modes(model), injected_modes(model)) == (own, injected)
    assert model.item_encoder.training
    assert model.sequence.training
    model.eval()
    assert own_modes(model) | injected_modes(model) == {False}


def test_only_the_layers_that_train_drop_out(tiny: ModuleType) -> None:
    _, model = tiny.build("frozen")
    model.frozen = frozenset()
    view = model.views["text"]
    view.layers[1].requires_grad_(True)
    model.train()
    assert {part.training for part in view.layers[1].modules()} == {True}
    assert {part.training for part in (*view.layers[0].modules(), *view.embeddings.modules())} == {False}


def test_a_parameter_that_a_method_hangs_on_an_encoder_module_does_not_wake_it(tiny: ModuleType) -> None:
    _, model = tiny.build("frozen")
    model.frozen = frozenset()
    model.views["text"].layers[0].register_parameter("scale", nn.Parameter(torch.ones(2, 2)))
    model.train()
    assert own_modes(model) == {False}


def test_the_policy_holds_for_a_deep_copy(tiny: ModuleType) -> None:
    _, model = tiny.build("lora")
    twin = copy.deepcopy(model.eval()).train()
    assert (own_modes(twin), injected_modes(twin)) == ({False}, {True})
    assert own_modes(model) == injected_modes(model) == {False}


# --- activation checkpointing ---------------------------------------------------------------------------------------


def run(tiny: ModuleType, method: str, *, checkpointed: bool, dropout: float) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients and the bytes kept for the backward pass of one training step."""
    options = {"lora": {"dropout": dropout}}.get(method, {})
    instance, model = tiny.build(method, options, encoder_dropout=dropout)
    tiny.train(instance, model, steps=1)  # LoRA's B and the like are no longer zero
    if checkpointed:
        for view in model.views.values():
            view.checkpoint_activations()
    model.train()
    model.zero_grad()
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = tiny.loss_of(model, tiny.batch())
    loss.backward()
    return float(loss.detach()), tiny.gradients(model), kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ["fft", "adapter", "lora", "bitfit", "prompt"])
def test_checkpointing_changes_memory_and_no_gradient(tiny: ModuleType, method: str, dropout: float) -> None:
    loss, gradients, kept = run(tiny, method, checkpointed=False, dropout=dropout)
    again, recomputed, kept_less = run(tiny, method, checkpointed=True, dropout=dropout)
    assert again == loss
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert kept_less < 0.7 * kept


def test_checkpointing_leaves_inference_alone(tiny: ModuleType) -> None:
    _, model = tiny.build("fft")
    before = tiny.vectors(model, tiny.items())
    for view in model.views.values():
        view.checkpoint_activations()
    assert torch.equal(tiny.vectors(model, tiny.items()), before)
