"""A method's own changes to the attention of an encoder: further keys and values, another mask, fewer keys.

Built on the attention registry of transformers: the encoder runs a function of ours under a name of its own, which
applies the changes of the layer that calls it and then the function it ran before (blocked, sdpa or eager).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.task.blocked_attention import BLOCKED, attend
from tpme.bench.task.families import SplitLinear
from tpme.bench.task.view import EncoderView

Attended = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""query (n, H, Q, d_h); key and value (n, H_kv, K, d_h), positions already applied; mask (n or 1, 1 or H, Q, K)."""

# The layer's changes, on the module that calls the attention function: an attribute survives a deep copy of the model.
_CHANGES = "_tpme_attention_changes"


def extend_attention(view: EncoderView, layer: int, change: Callable[[Tensor, Tensor, Tensor, Any], Attended]) -> None:
    """Attend to ``change(query, key, value, mask)`` in a layer, after the changes that it already has.

    The mask given is ``None`` (every key is attended to), bool (true: attended to) or added to the scores; what
    ``change`` returns may be any of these, if added in the dtype of the query. The number of keys may change, that of
    queries must not. A causal mask that the encoder leaves to the kernel is given as a mask.

    Args:
        view: of an encoder whose attention runs as ``blocked``, ``sdpa`` or ``eager``. layer: its index.
        change: a partial or a module, not a closure: a deep copy of the model then runs its own copy. A module has to
            be registered in the encoder by the method. With activation checkpointing it runs again in the backward
            pass, and must then return the same.

    Raises UserError for an encoder that computes its attention itself, or in another way.
    """
    base = str(view.config._attn_implementation).removeprefix("tpme-")
    name = f"{type(view.module).__name__} ({view.modality} encoder)"
    if not getattr(view.module, "_supports_attention_backend", False):
        raise UserError(
            f"{name}: it computes its attention itself, so a method cannot change it; choose another encoder"
        )
    if base not in (BLOCKED, "sdpa", "eager"):
        raise UserError(f"{name}: a method cannot change its attention as '{base}'; set attention = \"sdpa\"")
    module = _caller(view, layer)
    vars(module).setdefault(_CHANGES, []).append(change)
    if view.config._attn_implementation == base:
        library: Any = view.module
        library.set_attn_implementation(_register(base))


def _caller(view: EncoderView, layer: int) -> nn.Module:
    """The module of a layer that calls the attention function: it holds the query projection."""
    path = view.projections("query")[layer].rpartition(".")[0]
    if isinstance(view.module.get_submodule(path), SplitLinear):
        path = path.rpartition(".")[0]
    return view.module.get_submodule(path)


def _register(base: str) -> str:
    """Register the changed form of an attention function and its mask. Returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    make_mask = eager_mask if base == "eager" else sdpa_mask
    AttentionInterface.register(f"tpme-{base}", {"eager": _eager, "sdpa": _sdpa, BLOCKED: _blocked}[base])
    AttentionMaskInterface.register(f"tpme-{base}", make_mask)
    return f"tpme-{base}"


def _blocked(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    query, key, value, mask = _changed(module, query, key, value, mask, options)
    return attend(module, query, key, value, mask, **options)


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value, mask = _changed(module, query, key, value, mask, options)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    query, key, value, mask = _changed(module, query, key, value, mask, options)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    attend: Any = sys.modules[type(module).__module__]  # every encoder has an eager function of its own
    return attend.eager_attention_forward(module, query, key, value, mask, **options)


def _changed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Attended:
    changes = vars(module).get(_CHANGES)
    if not changes:
        return query, key, value, mask
    # A causal mask counts the keys from the first, so the kernel must not add one to what the changes return.
    causal = options.get("is_causal")
    options["is_causal"] = False
    if mask is None and (getattr(module, "is_causal", False) if causal is None else causal):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    for change in changes:
        query, key, value, mask = change(query, key, value, mask)
    return query, key, value, mask
