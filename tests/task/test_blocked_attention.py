"""Attention by blocks of items: the same results and gradients as torch's, where it applies, and torch's elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tpme.bench.contract.small_encoders import small_encoder
from tpme.bench.task import blocked_attention as attention
from tpme.bench.task.blocked_attention import BLOCKED, LONGEST, attend, attention_on, explain
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


def test_nothing_of_the_scores_is_kept_but_of_short_inputs() -> None:
    kept: dict[int, int] = {}
    for length in (WIDTH, 40):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            attend(layer(), *states(4, length, length, length), None)
        kept[length] = max(sizes)
    assert kept[WIDTH] >= 4 * HEADS * WIDTH**2
    assert kept[40] == 4 * HEADS * 40 * WIDTH


def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the runs of the suite's own code."""
    calls: list[int] = []
    blocks = attention._Blocks

    def counting(*given: Any) -> Any:
        calls.append(1)
        return blocks(*given)

    monkeypatch.setattr(attention, "_Blocks", counting)
    return calls


def test_torch_computes_what_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch)
    attend(layer(), *states(2, 20, 20, 20), None)
    assert calls == [1]
    grouped = layer()
    grouped.num_key_value_groups = HEADS  # type: ignore[assignment]
    query, key, value = states(2, 20, 20, 20)
    learned = torch.zeros(1, 1, 20, 20, dtype=torch.float64, requires_grad=True)
    attend(layer(is_causal=True), query, key, value, None)
    attend(layer(), query, key, value, None, is_causal=True)
    attend(layer(), query, key, value, None, dropout=0.5)
    attend(layer(), query, key, value, learned)
    attend(grouped, query, key[:, :1], value[:, :1], None)
    attend(layer(), *(one.bfloat16() for one in (query, key, value)), None)
    attend(layer(), *states(1, 4, LONGEST + 1, LONGEST + 1), None)
    with sdpa_kernel(SDPBackend.MATH):  # a second derivative, or counters
        attend(layer(), query, key, value, None)
    assert calls == [1]


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
