"""Every family of encoders, read as it was trained to be and taken apart by role; each against transformers alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpme.bench.contract.small_encoders import FAMILIES, POSITIONS, SIDE, VOCABULARY, modality_of, small_encoder
from tpme.bench.errors import UserError
from tpme.bench.task.families import FAMILIES as TABLE
from tpme.bench.task.families import TOWERS
from tpme.bench.task.items import Reads, TokenStates
from tpme.bench.task.view import EncoderView

WIDTH, FFN, DEPTH = 16, 32, 2
LENGTHS = torch.tensor([6, 3, 2, 5])
GATED = ("modernbert", "llama")
CAUSAL = ("llama", "clip-text")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def view_of(family: str, **settings: Any) -> EncoderView:
    return EncoderView(small_encoder(family, **settings), modality_of(family))


def inputs(family: str) -> dict[str, Tensor]:
    """Four items as ``encode`` takes them; titles end with the token that CLIP takes for the end."""
    generator = torch.Generator().manual_seed(0)
    if modality_of(family) == "image":
        return {"image": torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)}
    tokens = torch.randint(3, VOCABULARY - 1, (4, 6), generator=generator)
    tokens[torch.arange(4), LENGTHS - 1] = VOCABULARY - 1
    mask = (torch.arange(6) < LENGTHS[:, None]).long()
    return {"tokens": tokens * mask, "token_mask": mask}


@torch.no_grad()
def plain(family: str) -> Any:
    """What transformers returns for the same items, of an encoder that nothing was taken from."""
    items, module = inputs(family), small_encoder(family)
    if modality_of(family) == "image":
        return module(pixel_values=items["image"].float() / 127.5 - 1, output_hidden_states=True)
    if family == "siglip-text":  # padded to all positions and not masked, as it was trained
        tokens = torch.zeros(4, POSITIONS, dtype=torch.int64)
        tokens[:, :6] = items["tokens"]
        return module(input_ids=tokens, output_hidden_states=True)
    return module(input_ids=items["tokens"], attention_mask=items["token_mask"], output_hidden_states=True)


def masked_mean(states: Tensor) -> Tensor:
    return torch.stack([row[:length].mean(0) for row, length in zip(states, LENGTHS, strict=True)])


def at_the_end(states: Tensor) -> Tensor:
    return states[torch.arange(4), LENGTHS - 1]


def first(states: Tensor) -> Tensor:
    return states[:, 0]


READ: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("bert", "roberta", "distilbert", "modernbert", "vit", "deit", "dinov2", "clip-image"), first),
    **dict.fromkeys(("mpnet", "llama"), masked_mean),
    "clip-text": at_the_end,
    "siglip-text": lambda states: states[:, -1],
    "siglip-image": lambda states: states.mean(1),
}


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_its_default_reading_is_the_one_it_was_trained_for(family: str) -> None:
    view, output, read = view_of(family), plain(family), READ[family]
    states = view.encode(Reads((0, 1, 2), final=True, pool=view.shape.pool), **inputs(family))
    for level in range(DEPTH):
        torch.testing.assert_close(states[:, level], read(output.hidden_states[level]), **CLOSE)
    if family != "clip-image":  # its last norm is not applied to the last hidden state: see below
        torch.testing.assert_close(states[:, 3], read(output.last_hidden_state), **CLOSE)


def test_clip_text_is_read_where_its_own_pooler_reads() -> None:
    states = view_of("clip-text").encode(Reads(final=True, pool="last"), **inputs("clip-text"))
    torch.testing.assert_close(states[:, 0], plain("clip-text").pooler_output, **CLOSE)


def test_clip_vision_is_read_after_its_last_norm() -> None:
    view = view_of("clip-image")
    states = view.encode(Reads((2,), final=True), **inputs("clip-image"))
    torch.testing.assert_close(states[:, 1], plain("clip-image").pooler_output, **CLOSE)
    torch.testing.assert_close(view.final_norm(states[:, 0]), states[:, 1], **CLOSE)


def test_the_heads_of_siglip_get_what_is_read() -> None:
    head = small_encoder("siglip-text").head
    states = view_of("siglip-text").encode(Reads(final=True, pool="last"), **inputs("siglip-text"))
    torch.testing.assert_close(head(states[:, 0]), plain("siglip-text").pooler_output, **CLOSE)


@pytest.mark.parametrize("family", ["vit", "dinov2", "modernbert", "llama", "clip-text", "siglip-image"])
def test_the_final_state_is_after_the_final_norm(family: str) -> None:
    view = view_of(family)
    states = view.encode(Reads((2,), final=True, tokens="all"), **inputs(family)).states
    torch.testing.assert_close(view.final_norm(states[:, 0]), states[:, 1], **CLOSE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if modality_of(f) == "text"])
def test_items_that_begin_alike_get_different_vectors_and_padding_changes_none(family: str) -> None:
    """Read at its first token, an encoder whose attention is causal gives them one and the same."""
    view, items = view_of(family), inputs(family)
    items["tokens"][:, 0] = 7
    reads = Reads((1,), final=True, pool=view.shape.pool)
    states = view.encode(reads, **items)
    for vectors in states.unbind(1):
        assert torch.cdist(vectors, vectors).fill_diagonal_(1).min() > 1e-3
    longer = {
        "tokens": torch.cat([items["tokens"], torch.full((4, 3), 9)], dim=1),
        "token_mask": torch.cat([items["token_mask"], torch.zeros(4, 3, dtype=torch.int64)], dim=1),
    }
    torch.testing.assert_close(view.encode(reads, **longer), states, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_read_it_pools_the_tokens_that_its_mask_keeps(family: str) -> None:
    view = view_of(family)
    every = view.encode(Reads((1,), final=True, tokens="all"), **inputs(family))
    assert isinstance(every, TokenStates)
    assert every.mask.dtype == torch.bool
    lengths = LENGTHS if modality_of(family) == "text" and family != "siglip-text" else every.mask.new_full((4,), 0)
    for pool in view.shape.pools:
        states = view.encode(Reads((1,), final=True, pool=pool), **inputs(family))
        for item, (tokens, mask) in enumerate(zip(every.states, every.mask, strict=True)):
            assert int(mask.sum()) == (int(lengths[item]) or tokens.shape[1])
            kept = tokens[:, mask]
            expected = {"first": kept[:, 0], "mean": kept.mean(1), "last": kept[:, -1]}[pool]
            torch.testing.assert_close(states[item], expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_stands_for_itself_alone_is_not_read(family: str) -> None:
    view = view_of(family)
    assert ("first" in view.shape.pools) is (family not in (*CAUSAL, "siglip-text", "siglip-image"))
    for pool in {"first", "mean", "last"} - set(view.shape.pools):
        with pytest.raises(UserError, match=rf"encoder\): it cannot be read with pool = '{pool}'") as error:
            view.encode(Reads(final=True, pool=pool), **inputs(family))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="cannot be read"):
            EncoderView(small_encoder(family), modality_of(family), pool=pool)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_it_gives_nearly_the_same_states_in_float32(family: str) -> None:
    view = view_of(family)
    reads = Reads((0, 2), final=True, pool=view.shape.pool)
    whole = view.encode(reads, **inputs(family))
    half = EncoderView(small_encoder(family).bfloat16(), modality_of(family)).encode(reads, **inputs(family))
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < 0.05 * whole.abs().mean()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_reaches_every_parameter(family: str) -> None:
    """Poolers, heads and mask tokens are gone. The bias of a key shifts all scores alike: its gradient is rounding."""
    view = view_of(family)
    view.module.requires_grad_(True)
    states = view.encode(Reads(final=True, pool=view.shape.pool), **inputs(family))
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert [name for name, p in view.module.named_parameters() if p.grad is None] == []
    still = [name for name, p in view.module.named_parameters() if p.grad.abs().max() < 1e-8]
    keys = {f"{name}.bias" for name in view.projections("key")}
    assert set(still) <= keys


def test_nothing_that_a_state_depends_on_is_dropped() -> None:
    dropped = {"bert": "pooler", "dinov2": "embeddings.mask_token", "siglip-text": "head", "siglip-image": "head"}
    for family in FAMILIES:
        whole, kept = (dict(module.named_parameters()) for module in (small_encoder(family), view_of(family).module))
        if family not in GATED:  # whose fused projections are split
            assert {name.split(".")[0] for name in whole.keys() - kept.keys()} <= {"pooler", "head", "embeddings"}
            assert kept.keys() <= whole.keys()
        assert not any(name.startswith(dropped.get(family, "pooler")) for name in kept)


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_is_a_linear_layer_of_the_right_shape(family: str) -> None:
    view = view_of(family)
    heads = view.heads
    shared = heads.key_value * heads.width
    shapes = {"key": (shared, WIDTH), "value": (shared, WIDTH), "ffn_in": (FFN, WIDTH), "ffn_out": (WIDTH, FFN)}
    shapes |= {"ffn_gate": (FFN, WIDTH)}
    assert (heads.number, heads.key_value, heads.width) == (2, 1 if family == "llama" else 2, 8)
    assert view.ffn_width == FFN
    roles = ["query", "key", "value", "attention_output", "ffn_in", "ffn_out"] + ["ffn_gate"] * (family in GATED)
    names = [name for role in roles for name in view.projections(role)]
    assert len(set(names)) == DEPTH * len(roles)
    for role in roles:
        for name in view.projections(role):
            linear = view.module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            assert linear.weight.shape == shapes.get(role, (WIDTH, WIDTH)), name
    inside = [name for name, part in view.module.named_modules() if isinstance(part, nn.Linear)]
    assert set(inside) == set(names)  # there is no further one
    if family not in GATED:
        with pytest.raises(UserError, match="it has no 'ffn_gate'"):
            view.projections("ffn_gate")


@pytest.mark.parametrize("family", GATED)
def test_the_gate_is_the_projection_that_the_activation_follows(family: str) -> None:
    """``ffn_out`` reads act(gate x) * (in x)."""
    view, seen = view_of(family), {}

    def keep(role: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[role] = args[0] if role == "ffn_out" else output

    for role in ("ffn_in", "ffn_gate", "ffn_out"):
        view.module.get_submodule(view.projections(role)[0]).register_forward_hook(partial(keep, role))
    with torch.no_grad():
        view.encode(Reads(final=True, pool=view.shape.pool), **inputs(family))
    activation = {"modernbert": nn.GELU(), "llama": nn.SiLU()}[family]
    torch.testing.assert_close(seen["ffn_out"], activation(seen["ffn_gate"]) * seen["ffn_in"], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_sublayer_outputs_are_what_the_residuals_get(family: str) -> None:
    """After dropout and LayerScale; where norms follow the residuals (BERT), before those."""
    view, seen = view_of(family), []
    for output in view.sublayer_outputs(1):
        output.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        before, after = view.encode(Reads((1, 2), tokens="all"), **inputs(family)).states.unbind(1)
        norms = view.norms(1) if family in ("bert", "roberta", "distilbert", "mpnet") else (nn.Identity(),) * 2
        for output, norm in zip(seen, norms, strict=True):
            before = norm(before + output)
    torch.testing.assert_close(after, before, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_are_those_of_the_two_sublayers(family: str) -> None:
    """A gradient into a norm of a layer's first half changes what ``halves`` gives, and so for the second."""
    view = view_of(family)
    for layer in range(DEPTH):
        for norm in view.norms(layer):
            if isinstance(norm, nn.Identity):
                assert (family, layer) == ("modernbert", 0)
            else:
                assert norm.weight.shape == (WIDTH,)
    if not isinstance(view.norms(0)[0], nn.Identity):
        _, halves = halves_of(view, 0, family)
        assert parameters_used(view, halves[0]) == {id(p) for p in view.norms(0)[0].parameters()}
    _, halves = halves_of(view, 1, family)
    assert parameters_used(view, halves[1]) == {id(p) for p in view.norms(1)[1].parameters()}


def halves_of(view: EncoderView, layer: int, family: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Output of a layer, and of its two halves in a row, for the states that it gets of ``inputs``."""
    called: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        called.update(args=args, kwargs=kwargs, output=output[0] if isinstance(output, tuple) else output)

    handle = view.layers[layer].register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        view.encode(Reads(final=True, pool=view.shape.pool), **inputs(family))
    handle.remove()
    halves = view.halves(layer)
    between = halves.attention(*called["args"], **called["kwargs"])
    return called["output"], (between, halves.feed_forward(between.detach()))


def parameters_used(view: EncoderView, output: Tensor) -> set[int]:
    """Ids of the norms' parameters that ``output`` depends on."""
    norms = [norm for layer in range(DEPTH) for norm in view.norms(layer)]
    parameters = [p for norm in norms for p in norm.parameters()]
    gradients = torch.autograd.grad(output.sum() + output.square().sum(), parameters, allow_unused=True)
    return {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_halves_of_a_layer_are_the_layer(family: str) -> None:
    view = view_of(family)
    for layer in range(DEPTH):
        whole, (between, result) = halves_of(view, layer, family)
        torch.testing.assert_close(result, whole, rtol=0, atol=0)
        assert between.shape == whole.shape
        assert not torch.allclose(between, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_something_can_stand_between_the_halves(family: str) -> None:
    """Twice, after one another; it changes the residual too, is deep-copied, and gradients flow through it."""
    view = view_of(family)
    reads = Reads((0, 1, 2), final=True, pool=view.shape.pool)
    before = view.encode(reads, **inputs(family))
    view.insert_between(1, nn.Identity())
    torch.testing.assert_close(view.encode(reads, **inputs(family)), before, rtol=0, atol=0)
    linear = nn.Linear(WIDTH, WIDTH)
    view.module.add_module("between", linear)
    view.insert_between(1, linear)
    view.insert_between(1, torch.neg)
    after = view.encode(reads, **inputs(family))
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2])
    after.sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        twin = copy.deepcopy(view)
        linear.weight.zero_()
        assert torch.equal(twin.encode(reads, **inputs(family)), after)
        assert not torch.allclose(view.encode(reads, **inputs(family)), after)


def test_what_stands_between_the_halves_is_seen_by_the_second_half_and_the_residual() -> None:
    view = view_of("vit")
    _, (between, _) = halves_of(view, 1, "vit")
    view.insert_between(1, lambda states: states + 1)
    whole = view.encode(Reads((2,), tokens="all"), **inputs("vit")).states[:, 0]
    layer = view.layers[1]
    torch.testing.assert_close(whole, between + 1 + layer.mlp(layer.layernorm_after(between + 1)), **CLOSE)


def test_the_table_and_the_small_encoders_are_of_the_same_families() -> None:
    small = {small_encoder(family).config.model_type for family in FAMILIES}
    assert small | {"xlm-roberta", "electra", "deberta-v2", "dinov3_vit"} == set(TABLE)


def test_the_document_lists_every_family_as_it_is_read() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "matrix.md").read_text()
    (section,) = re.findall(r"^## Supported encoders\n(.*?)(?=^## )", document, flags=re.DOTALL | re.MULTILINE)
    told: dict[str, tuple[str, ...]] = {}
    for names, default, others in re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) ?\|$", section, flags=re.MULTILINE):
        for name in re.findall(r"`([\w-]+)`", names):
            if name not in TOWERS:
                told[name] = (default.split()[0], *filter(None, others.split(", ")))
    assert told == {name: family.pools for name, family in TABLE.items()}
    assert all(f"`{name}`, " in section for name in TOWERS)
