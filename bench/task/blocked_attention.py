"""The attention of encoders on a CPU: the scores of a few items at a time, which stay in the processor's cache.

What is computed is ``softmax(scale Q K^T + mask) V``. Written with whole matrices, it moves n H Q K scores through
memory several times and keeps them for the backward pass. Here blocks of items go through batched matrix products, the
softmax runs in place, and the backward pass computes the scores again (Rabe and Staats, 2021; Dao et al., NeurIPS
2022). torch's own kernel for CPUs divides queries and keys instead, into many small products, some with a transposed
operand; how fast those are depends on the make of the processor. Where there are no more keys than a head is wide
(titles), the scores are kept: they take no more memory than the queries, and computing them again would take longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCKED = "blocked"
"""Name of this attention in transformers' registry, and in records."""
BLOCK_BYTES = 8 << 20
"""Scores of this many bytes are computed at a time, at least those of one item. Smaller blocks are no faster, and
threads wait for each other after every product, which beside a busy process takes long."""
LONGEST = 256
"""With more keys, blocks hold few items, and torch's kernel is faster."""
_KNOWN = {"dropout", "scaling", "is_causal", "position_ids", "use_cache"}
"""Options of transformers that are read here, or change nothing in attention."""


def choose_attention(module: nn.Module) -> None:
    """Let a transformers encoder run ``blocked`` attention where the rule of ``explain`` says so."""
    config: Any = module.config
    parameter = next(module.parameters(), None)
    on_cpu = parameter is not None and parameter.device.type == "cpu" and parameter.dtype.itemsize >= 4
    if on_cpu and config._attn_implementation == "sdpa" and getattr(module, "_supports_attention_backend", False):
        register()
        library: Any = module
        library.set_attn_implementation(BLOCKED)


def attention_on(device: str, name: str | None) -> str | None:
    """The attention that runs on a device (``cpu`` or ``cuda``) for the name in an encoder's configuration."""
    return "sdpa" if name == BLOCKED and device != "cpu" else name


def explain(device: str) -> str:
    """Which attention encoders get on a device (``cpu`` or ``cuda``), and why."""
    if device == "cpu":
        return (
            f"{BLOCKED}: whole scores where an item has no more tokens than a head is wide, else those of a few items "
            f"at a time, to stay in the cache; torch's kernel (sdpa) beyond {LONGEST} tokens, in half precision and "
            "with training.compile"
        )
    return "sdpa: torch chooses a fused kernel by type and mask"


def register() -> None:
    """Make ``blocked`` known to transformers, with the masks of ``sdpa``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BLOCKED, attend)
    AttentionMaskInterface.register(BLOCKED, sdpa_mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; where ``blocked`` does not apply, that of torch.

    Args:
        module: the attention layer. query: (n, H, Q, d_h). key, value: (n, H, K, d_h). mask: (n or 1, 1 or H, Q, K),
            bool (true: attended to) or added to the scores; ``None``: every key is. As in eager attention, a query
            that attends to no key gets the mean of all values.
        options: of transformers; ``scaling`` is by default 1 / sqrt(d_h).

    Returns:
        (n, Q, H, d_h), and no weights.
    """
    dropout = float(options.get("dropout") or 0.0)
    applies = _applies(module, query, key, value, mask, options)
    short = applies and key.shape[2] <= query.shape[3]
    if not short and (not applies or dropout or key.shape[2] > LONGEST):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
        return result
    scaling = options.get("scaling")
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    if short:
        scores = torch.matmul(query, key.transpose(2, 3)).mul_(scale)
        if mask is not None:
            _mask(scores, mask)
        weights = torch.softmax(scores, dim=-1)
        if dropout:
            weights = nn.functional.dropout(weights, dropout)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), None
    found: Tensor = _Blocked.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return found.transpose(1, 2), None


def _applies(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return False
    # torch's fused kernels are off: a second derivative is wanted, or operators are counted.
    if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        return False
    if key.shape[:2] != query.shape[:2] or value.shape != key.shape or not query.dtype == key.dtype == value.dtype:
        return False
    known = _KNOWN if mask is None else _KNOWN | {"sliding_window"}  # a window is part of the mask
    if any(name not in known for name, option in options.items() if option is not None and option is not False):
        return False
    if mask is not None:
        return mask.ndim == 4 and not mask.requires_grad
    causal = options.get("is_causal")
    return query.shape[2] == 1 or not (getattr(module, "is_causal", True) if causal is None else causal)


def _mask(scores: Tensor, mask: Tensor) -> None:
    """Put ``scores`` (items, H, Q, K) under a mask that broadcasts to them, in place."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(mask.logical_not(), torch.finfo(scores.dtype).min)
    else:
        scores.add_(mask)


class _Blocked(torch.autograd.Function):
    """Attention by blocks of items. Keeps queries, keys and values, which the projections' results are."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out = _by_token(query, value.shape[3])
        blocks = _Blocks(query, key, value, mask, scale)
        for part in blocks.parts:
            weights, _, _, v = blocks.load(part)
            blocks.multiply(weights, v, out[part])
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        to_query, to_key, to_value = (_by_token(states, states.shape[3]) for states in (query, key, value))
        blocks = _Blocks(query, key, value, mask, ctx.scale)
        room, g_room = torch.empty_like(blocks.scores), blocks.room_of(gradient)
        of_query, of_key, of_value = ctx.needs_input_grad[:3]
        for part in blocks.parts:
            weights, q, k, v = blocks.load(part)
            g = _flat(gradient[part], g_room)
            if of_value:
                blocks.multiply(weights.transpose(1, 2), g, to_value[part])
            if not (of_query or of_key):
                continue
            of_scores = torch.bmm(g, v.transpose(1, 2), out=room[: len(q)])
            torch._softmax_backward_data(of_scores, weights, -1, of_scores.dtype, grad_input=of_scores)
            if of_query:
                blocks.multiply(of_scores, k, to_query[part], ctx.scale)
            if of_key:
                blocks.multiply(of_scores.transpose(1, 2), q, to_key[part], ctx.scale)
        found = zip((to_query, to_key, to_value), ctx.needs_input_grad, strict=False)
        return *(states if needed else None for states, needed in found), None, None


class _Blocks:
    """A few items at a time, in the same memory."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
        self.states, self.mask, self.scale = (query, key, value), mask, scale
        (n, heads, queries, _), keys = query.shape, key.shape[2]
        self.size = min(n, max(1, BLOCK_BYTES // max(1, heads * queries * keys * query.element_size())))
        self.parts = [slice(start, start + self.size) for start in range(0, n, max(1, self.size))]
        self.scores = query.new_empty(self.size * heads, queries, keys)
        self.rooms = [self.room_of(states) for states in self.states]
        self.product = self.room_of(query if queries > keys else key)

    def room_of(self, states: Tensor) -> Tensor:
        """Room for one block of ``states`` (n, H, tokens, d_h), flat."""
        return states.new_empty(self.size * states[:1].numel())

    def load(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention weights (items H, Q, K), queries, keys and values (items H, tokens, d_h); until the next call."""
        q, k, v = (_flat(states[part], room) for states, room in zip(self.states, self.rooms, strict=True))
        weights = self.scores[: len(q)]
        torch.baddbmm(weights, q, k.transpose(1, 2), beta=0, alpha=self.scale, out=weights)
        if self.mask is not None:
            mask = self.mask[part] if len(self.mask) > 1 else self.mask
            _mask(weights.view(-1, self.states[0].shape[1], *weights.shape[1:]), mask)
        torch._softmax(weights, -1, False, out=weights)
        return weights, q, k, v

    def multiply(self, a: Tensor, b: Tensor, place: Tensor, scale: float = 1.0) -> None:
        """Write ``scale a b``, (items H, tokens, d_h), to ``place`` (items, H, tokens, d_h)."""
        found = self.product[: place.numel()].view(len(a), *place.shape[2:])
        torch.baddbmm(found, a, b, beta=0, alpha=scale, out=found)
        place.copy_(found.view(place.shape))


def _by_token(like: Tensor, width: int) -> Tensor:
    """Room for (n, H, tokens, width) with tokens before heads in memory, as the projections' results are."""
    n, heads, tokens, _ = like.shape
    return like.new_empty(n, tokens, heads, width).transpose(1, 2)


def _flat(states: Tensor, room: Tensor) -> Tensor:
    """``states`` (items, H, tokens, d_h) copied to ``room``, as the matrices (items H, tokens, d_h) of a product."""
    copied = room[: states.numel()].view(states.shape).copy_(states)
    return copied.flatten(0, 1)
