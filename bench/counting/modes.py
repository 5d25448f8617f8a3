"""Two modes for one training step on the ``meta`` device: one runs it as the target would, one counts its cost.

``Target`` runs what a GPU runs where ``meta`` alone differs: CUDA's autocast, its one-byte dropout masks and, for
planning, its fused attention. ``Tracker`` follows every operator below autograd: FLOPs, traffic, and live memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tpme.bench.counting.formulas import flops_of

ALLOCATION_BYTES = 512
"""CUDA's caching allocator hands out multiples of this."""

# CUDA's autocast (torch.amp's op lists), as far as encoders, side networks and losses use it.
_TO_HALF = """linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm mv einsum conv1d conv2d conv3d prelu
    scaled_dot_product_attention"""
_TO_FLOAT = """layer_norm group_norm rms_norm norm softmax log_softmax logsumexp cross_entropy nll_loss kl_div mse_loss
    l1_loss smooth_l1_loss binary_cross_entropy_with_logits cosine_similarity cdist exp log log1p pow __pow__ rsqrt
    reciprocal sum prod cumsum cumprod"""

_LOWER, _FLOAT = (frozenset(names.split()) for names in (_TO_HALF, _TO_FLOAT))


class Target(TorchFunctionMode):
    """Runs the code under it as CUDA would: same dtypes, same saved tensors.

    Args:
        dtype: of the matrix products under autocast; ``None`` without autocast.
        fused_attention: attention by the kernel that CUDA would choose (FlashAttention-2 in half precision without a
            mask, else the memory-efficient one) in place of torch's math.
    """

    def __init__(self, dtype: torch.dtype | None, *, fused_attention: bool) -> None:
        super().__init__()
        self.dtype, self.fused_attention = dtype, fused_attention
        self._weights: dict[Tensor, Tensor] | None = {}

    def end_forward(self) -> None:
        """Forget the cast weights, as leaving autocast does; checkpointing casts them again."""
        self._weights = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Cast the arguments of ``func`` as autocast does, then run it or CUDA's counterpart."""
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if self.dtype is not None and name in _LOWER:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif self.dtype is not None and name in _FLOAT:
            args, kwargs = tree_map(_float, (args, kwargs))
        if name == "scaled_dot_product_attention" and self.fused_attention:
            return _fused_attention(*args, **kwargs)
        if name == "dropout":
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dtype == torch.float32):
            return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        # Autocast casts a trained weight once a step, a frozen one at every use.
        if self._weights is None or not (value.requires_grad and value.is_leaf):
            return value.to(self.dtype)
        if value not in self._weights:
            self._weights[value] = value.to(self.dtype)
        return self._weights[value]


def _float(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """CUDA's kernel keeps a mask of one byte per element; the composite kernel of other devices keeps a float."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return cast(Tensor, flash(query, key, value, dropout_p, is_causal, scale=scale)[0])
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return cast(Tensor, efficient(query, key, value, bias, trains, dropout_p, is_causal, scale=scale)[0])


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs under it.

    Attributes:
        flops: so far, 1 multiply-add = 2 FLOPs (``flops_of``).
        uncounted: operators that may compute something but have no formula.
        work: how many operators there were of each (dtype, FLOPs, bytes read and written).
        peak_bytes: most memory alive at one time, ``held`` tensors included, ``left_out`` ones not.
    """

    def __init__(self, held: Iterable[Tensor] = (), left_out: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.peak_bytes, self._alive_bytes = 0, 0, 0
        self.uncounted: set[str] = set()
        self.work: Counter[tuple[torch.dtype, int, int]] = Counter()
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._saved: set[int] = set()
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        for tensor in held:
            self._track(tensor)
        self._held = set(self._alive)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note what it cost."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._track(tensor)
        if func.is_view or not tensors:
            return out
        flops = flops_of(func, args, kwargs, out)
        if flops is None:
            self.uncounted.add(str(func.overloadpacket))
        self.flops += (flops := flops or 0)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.work[(read or tensors)[0].dtype, flops, sum(map(_bytes, (*read, *tensors)))] += 1
        return out

    def saving(self) -> AbstractContextManager[Any]:
        """Inside it, note what autograd keeps for the backward pass."""

        def pack(tensor: Tensor) -> Tensor:
            self._track(tensor)
            self._saved.add(tensor.untyped_storage()._cdata)
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps now: distinct storages, without those held from the start (weights, batch)."""
        return sum(self._alive[key][1] for key in self._saved if key in self._alive and key not in self._held)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._left_out or not size:
            return

        def release(_reference: object, key: int = key, size: int = size) -> None:
            del self._alive[key]
            self._saved.discard(key)
            self._alive_bytes -= rounded(size)

        self._alive[key] = weakref.ref(storage, release), size
        self._alive_bytes += rounded(size)
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)


def rounded(size: int) -> int:
    """Bytes that CUDA's allocator takes for a tensor of ``size`` bytes."""
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor reads no more than its storage.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
