"""Changes to the attention of every family: further keys, masks of one's own, causal ones, recomputation, copies."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model

from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.errors import UserError
from tpme.bench.task.items import Reads
from tpme.bench.task.view import EncoderView
from tpme.methods.parts.attention import extend_attention

SUPPORTED = [family for family in FAMILIES if family != "mpnet"]
EVERY = Reads((1,), final=True, tokens="all")


def view_of(family: str, attention: str = "blocked") -> EncoderView:
    module = small_encoder(family)
    if family != "mpnet" and attention != "blocked":
        module.set_attn_implementation(attention)
    return EncoderView(module, modality_of(family), attention=attention if attention != "blocked" else None)


def inputs(view: EncoderView) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    if view.modality == "image":
        return {"image": torch.randint(0, 256, (3, 3, 32, 32), generator=draw, dtype=torch.uint8)}
    mask = (torch.arange(9) < torch.tensor([9, 5, 1])[:, None]).long()
    return {"tokens": torch.randint(3, 49, (3, 9), generator=draw), "token_mask": mask}


def read(view: EncoderView) -> Tensor:
    """The states of the items' own tokens."""
    every = view.encode(EVERY, **inputs(view))
    return every.states.transpose(1, 2)[every.mask]


def twice(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
    """Every key and value twice, which leaves a softmax-weighted mean as it is."""
    both = None if mask is None else torch.cat([mask, mask], dim=-1)
    return query, torch.cat([key, key], dim=2), torch.cat([value, value], dim=2), both


def with_noise(hidden: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
    """Three foreign keys and values before the others, masked if ``hidden``."""
    foreign = torch.full_like(key[:, :, :1], 3.0).expand(-1, -1, 3, -1)
    if mask is None:
        mask = torch.ones(len(key), 1, query.shape[2], key.shape[2], dtype=torch.bool)
    shown, masked = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask = nn.functional.pad(mask, (3, 0), value=masked if hidden else shown)
    return query, torch.cat([foreign, key], dim=2), torch.cat([foreign, value], dim=2), mask


def extend(view: EncoderView, change: Any) -> None:
    for layer in range(view.shape.depth):
        extend_attention(view, layer, change)


@pytest.mark.parametrize("attention", ["blocked", "sdpa", "eager"])
@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_further_keys_and_their_mask_count(family: str, attention: str) -> None:
    """Padded texts, causal attention (Llama, CLIP), windows (ModernBERT) and images without a mask."""
    view = view_of(family, attention)
    expected = read(view)
    extend(view, twice)
    torch.testing.assert_close(read(view), expected, atol=1e-5, rtol=1e-4)
    extend(view, partial(with_noise, True))
    torch.testing.assert_close(read(view), expected, atol=1e-5, rtol=1e-4)
    extend(view, partial(with_noise, False))
    assert (read(view) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["blocked", "sdpa", "eager"])
@torch.no_grad()
def test_a_causal_mask_that_is_left_to_the_kernel_is_given_as_one(attention: str) -> None:
    """Foreign keys before the others would otherwise shift it: every query would miss three of its own."""
    view, tokens = view_of("llama", attention), torch.arange(3, 12)[None]
    expected = view.module(input_ids=tokens).last_hidden_state
    extend(view, partial(with_noise, True))
    torch.testing.assert_close(view.module(input_ids=tokens).last_hidden_state, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["blocked", "sdpa", "eager"])
@torch.no_grad()
def test_a_change_may_drop_the_mask(attention: str) -> None:
    """Llama then attends to later tokens and to padding, as with a mask that masks nothing."""
    found = []
    for drop in (True, False):
        view = view_of("llama", attention)
        extend(
            view,
            lambda query, key, value, mask, drop=drop: (query, key, value, None if drop else torch.ones_like(mask)),
        )
        found.append(view.encode(EVERY, **inputs(view)).states)
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_other_layers_stay_and_changes_follow_one_another() -> None:
    view = view_of("bert")
    before = view.encode(EVERY, **inputs(view)).states
    keys: list[int] = []

    def count(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        keys.append(key.shape[2])
        return query, key, value, mask

    for change in (count, partial(with_noise, False), count):
        extend_attention(view, 1, change)
    after = view.encode(EVERY, **inputs(view)).states
    assert keys == [9, 12]
    assert torch.equal(after[:, 0], before[:, 0])  # level 1, which layer 0 gives
    assert not torch.allclose(after[:, 1], before[:, 1], atol=1e-2)


class Further(nn.Module):
    """One trained key and value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(width))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        own = self.vector.expand(len(key), key.shape[1], 1, -1)
        mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0)
        return query, torch.cat([own, key], dim=2), torch.cat([own, value], dim=2), mask


@pytest.mark.parametrize("attention", ["blocked", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "vit", "llama", "clip-text"])
def test_recomputed_activations_give_the_same_gradients(family: str, attention: str) -> None:
    found = []
    for recomputed in (False, True):
        view = view_of(family, attention)
        further = Further(view.heads.width)
        view.module.add_module("further", further)
        extend(view, further)
        if recomputed:
            view.checkpoint_activations()
        read(view).square().sum().backward()
        found.append(further.vector.grad)
    assert found[0].abs().min() > 0
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
def test_a_deep_copy_runs_its_own_change() -> None:
    view = view_of("bert")
    view.module.add_module("further", Further(view.heads.width))
    extend(view, view.module.further)
    before = read(view)
    other = copy.deepcopy(view)
    other.module.further.vector.mul_(3)
    assert torch.equal(read(view), before)
    assert not torch.allclose(read(other), before, atol=1e-3)


@pytest.mark.parametrize("family", ["mpnet", "deberta-v2"])
def test_an_encoder_that_computes_its_attention_itself_is_refused(family: str) -> None:
    module = small_encoder("mpnet")
    if family == "deberta-v2":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        module = DebertaV2Model(DebertaV2Config(vocab_size=50, **sizes))
    with pytest.raises(UserError, match="computes its attention itself") as error:
        extend_attention(EncoderView(module, "text"), 0, twice)
    assert "\n" not in str(error.value)


def test_another_attention_function_is_refused() -> None:
    with pytest.raises(UserError, match="'flex_attention'; set attention = \"sdpa\""):
        extend_attention(view_of("bert", "flex_attention"), 0, twice)
