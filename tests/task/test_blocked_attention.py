"""Attention by blocks of items: the same results and gradients as torch's, where it applies, and torch's elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.task import blocked_attention as attention
from tpme.bench.task.blocked_attention import BLOCKED, LONGEST, attend, attention_on, explain
from tpme.bench.task.items import Reads
from tpme.bench.task.view import EncoderView

HEADS, WIDTH = 3, 8


def layer(is_causal: bool = False) -> nn.Module:
    module = nn.Module()
    module.is_causal = is_causal  # type: ignore[assignment]
    return module


def states(items: int, *lengths: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value as projections give them: (n, H, tokens, d_h), tokens before heads in memory."""
    draw = torch.Generator().manual_seed(0)
    made = (torch.randn(items, t, HEADS, WIDTH, generator=draw, dtype=dtype) for t in lengths)
    return [one.transpose(1, 2).requires_grad_() for one in made]


def mask_of(kind: str, items: int, queries: int, keys: int) -> Tensor | None:
    draw = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "added":
        return torch.randn(1, 1, queries, keys, generator=draw, dtype=torch.float64)
    heads = HEADS if kind == "by head" else 1
    kept = torch.rand(items, heads, 1 if kind == "titles" else queries, keys, generator=draw) > 0.3
    kept[..., 0] = True
    return kept.expand(-1, -1, queries, -1)


@pytest.mark.parametrize("kind", ["none", "titles", "by head", "added"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (19, 19), (9, 30)])
def test_results_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, kind: str, queries: int, keys: int
) -> None:
    """Kept scores (5 keys), and blocks of two items, the last one of one item."""
    monkeypatch.setattr(attention, "BLOCK_BYTES", 2 * HEADS * queries * keys * 8)
    mask, found = mask_of(kind, 7, queries, keys), []
    for run in (attend, sdpa_attention_forward):
        given = states(7, queries, keys, keys)
        out, _ = run(layer(), *given, mask, scaling=0.3, dropout=0.0)  # type: ignore[operator]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        found.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
        assert ours.shape == theirs.shape


def _noted(shapes: list[tuple[int, ...]], kept: Tensor) -> Tensor:
    shapes.append(tuple(kept.shape))
    return kept


def test_nothing_of_the_scores_is_kept_but_of_short_inputs() -> None:
    kept: dict[int, set[tuple[int, ...]]] = {}
    for length in (5, 40):
        shapes: list[tuple[int, ...]] = []
        note = partial(_noted, shapes)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            attend(layer(), *states(4, length, length, length), None)
        kept[length] = {shape[-2:] for shape in shapes}
    assert (5, 5) in kept[5]
    assert (40, 40) not in kept[40]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_gradients_that_are_wanted_are_computed(wanted: tuple[int, ...]) -> None:
    found = []
    for run in (attend, sdpa_attention_forward):
        given = states(3, 20, 20, 20)
        for place, one in enumerate(given):
            one.requires_grad_(place in wanted)
        out, _ = run(layer(), *given, None)  # type: ignore[operator]
        found.append(torch.autograd.grad(out.square().sum(), [given[place] for place in wanted]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of keys of every call that was left to torch."""
    calls: list[int] = []

    def counting(module: nn.Module, query: Tensor, key: Tensor, *given: Any, **options: Any) -> Any:
        calls.append(key.shape[2])
        return sdpa_attention_forward(module, query, key, *given, **options)

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", counting)
    return calls


@pytest.mark.parametrize("length", [5, 20])
def test_torch_computes_what_does_not_apply(by_torch: list[int], length: int) -> None:
    query, key, value = states(2, length, length, length)
    attend(layer(), query, key, value, None)
    assert by_torch == []
    grouped = layer()
    grouped.num_key_value_groups = HEADS  # type: ignore[assignment]
    learned = torch.zeros(1, 1, length, length, dtype=torch.float64, requires_grad=True)
    attend(layer(is_causal=True), query, key, value, None)
    attend(layer(), query, key, value, None, is_causal=True)
    attend(layer(), query, key, value, learned)
    attend(grouped, query, key[:, :1], value[:, :1], None)
    attend(layer(), *(one.bfloat16() for one in (query, key, value)), None)
    attend(layer(), query, key, value, None, position_bias=learned.detach())
    with sdpa_kernel(SDPBackend.MATH):  # a second derivative, or counters
        attend(layer(), query, key, value, None)
    assert by_torch == [length] * 7


def test_long_inputs_and_their_dropout_are_left_to_torch(by_torch: list[int]) -> None:
    attend(layer(), *states(1, 4, LONGEST + 1, LONGEST + 1), None)
    attend(layer(), *states(1, 20, 20, 20), None, dropout=0.5)
    assert by_torch == [LONGEST + 1, 20]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("mpnet", "llama")])
def test_every_family_runs_it(family: str, by_torch: list[int]) -> None:
    """But MPNet, which computes its attention itself, and Llama, whose heads share keys."""
    view = EncoderView(small_encoder(family), modality_of(family))
    assert view.config._attn_implementation == BLOCKED
    if view.modality == "image":
        view.encode(Reads(final=True, pool=view.pool), image=torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    else:
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        view.encode(Reads(final=True, pool=view.pool), tokens=torch.arange(3, 15).view(2, 6), token_mask=mask)
    assert by_torch == []


def test_short_inputs_drop_out_as_many_weights_as_asked_for() -> None:
    torch.manual_seed(0)
    query, key, value = states(200, WIDTH, WIDTH, WIDTH)
    ones = torch.ones_like(value)
    out, _ = attend(layer(), query, key, ones, None, dropout=0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.std().item() > 0.1
    assert attend(layer(), query, key, ones, None)[0].std().item() < 1e-12


def test_an_encoder_on_a_cpu_gets_it_unless_another_is_asked_for() -> None:
    assert EncoderView(small_encoder("bert"), "text").config._attn_implementation == BLOCKED
    assert EncoderView(small_encoder("bert"), "text", attention="sdpa").config._attn_implementation == "sdpa"
    assert EncoderView(small_encoder("bert").bfloat16(), "text").config._attn_implementation == "sdpa"
    assert EncoderView(small_encoder("mpnet"), "text").config._attn_implementation != BLOCKED


def test_what_runs_is_said_by_device() -> None:
    assert [attention_on("cpu", BLOCKED), attention_on("cuda", BLOCKED), attention_on("cuda", "eager")] == [
        BLOCKED,
        "sdpa",
        "eager",
    ]
    assert explain("cpu").startswith("blocked: ")
    assert explain("cuda").startswith("sdpa: ")
