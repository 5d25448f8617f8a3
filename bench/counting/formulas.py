"""FLOPs of single operators: torch's formulas, those it lacks, and the operators that count as none.

FLOPs are those of matrix products and convolutions (1 multiply-add = 2 FLOPs), of the factorisations and solutions that
stand for products, and of Fourier transforms. Pointwise operators, norms, sums and copies count as none by convention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# Neither product nor convolution. Pointwise operators are tagged as such by torch; ``x_`` is free where ``x`` is.
_NO_PRODUCT = """_adaptive_avg_pool2d _log_softmax _log_softmax_backward_data _safe_softmax _softmax
    _softmax_backward_data _to_copy _unsafe_view all amax amin aminmax any arange argmax argmin argsort as_strided
    bernoulli bincount block_diag bucketize cat clone constant_pad_nd copy count_nonzero cummax cumprod cumsum detach
    diag_embed embedding embedding_dense_backward empty empty_like expand_copy exponential eye fill flip floor_divide
    full full_like gather gelu_backward index index_add index_copy index_fill index_put index_select lerp lift_fresh
    linalg_vector_norm linspace logcumsumexp logsumexp masked_fill masked_scatter max mean median min multinomial
    native_dropout native_dropout_backward native_group_norm native_group_norm_backward native_layer_norm
    native_layer_norm_backward new_empty new_empty_strided new_full new_ones new_zeros nll_loss_backward
    nll_loss_forward nonzero norm normal ones ones_like prod rand rand_like randint randn randn_like randperm repeat
    resize roll scalar_tensor scatter scatter_add scatter_reduce select_backward select_scatter slice_backward
    slice_scatter sort split_with_sizes_copy stack std std_mean sum topk tril tril_indices triu triu_indices uniform var
    var_mean zero zeros zeros_like _fused_rms_norm _fused_rms_norm_backward"""
_FREE = frozenset(_NO_PRODUCT.split())


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int | None:
    """FLOPs of one call of the operator ``func``, which returned ``out``; ``None`` where there is no formula for it."""
    formula = flop_registry.get(func.overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    name = func.overloadpacket.__name__
    if name in _FORMULAS:
        return round(_FORMULAS[name](*args))
    free = torch.Tag.pointwise in func.tags or name in _FREE or name.removesuffix("_") in _FREE
    return 0 if free else None


def _inverse(a: Tensor, *_: object) -> float:
    """``A^-1``, (*, n, n), by LU: ``2 n^3``."""
    return 2 * a.numel() * a.shape[-1]


def _lu(a: Tensor, *_: object) -> float:
    """LU of (*, n, n): ``2/3 n^3``."""
    return 2 / 3 * a.numel() * a.shape[-1]


def _lu_solve(lu: Tensor, _pivots: Tensor, b: Tensor, *_: object) -> float:
    """``A^-1 B`` from the LU of A, (*, n, n), for k columns B: two triangular systems of ``n^2 k``."""
    return 2 * b.numel() * lu.shape[-1]


def _solve(a: Tensor, b: Tensor, *_: object) -> float:
    """``A^-1 B`` for k columns B: ``2/3 n^3 + 2 n^2 k``."""
    return _lu(a) + 2 * b.numel() * a.shape[-1]


def _triangular(a: Tensor, b: Tensor, *_: object) -> float:
    """``A^-1 B`` of a triangular A, (*, n, n), for k columns B: ``n^2 k``."""
    return b.numel() * a.shape[-1]


def _cholesky(a: Tensor, *_: object) -> float:
    """``A = L L^T``, (*, n, n): ``1/3 n^3``."""
    return a.numel() * a.shape[-1] / 3


def _fourier(x: Tensor, dims: list[int], *_: object) -> float:
    """Transform over N points: ``5 N log2 N`` (Cooley & Tukey, 1965), half of that from or to real numbers."""
    points = math.prod(x.shape[dim] for dim in dims)
    return (5 if x.is_complex() else 2.5) * x.numel() * math.log2(max(points, 2))


def _to_real(x: Tensor, dims: list[int], _normalisation: int, last: int) -> float:
    """The inverse transform to ``last`` real numbers along the last of ``dims``."""
    points = math.prod([*(x.shape[dim] for dim in dims[:-1]), last])
    return 2.5 * x.numel() / x.shape[dims[-1]] * last * math.log2(max(points, 2))


def _vector(matrix: Tensor, *_: object) -> float:
    """A matrix, (m, n), or a vector, (n,), times a vector, (n,)."""
    return 2 * matrix.numel()


def _added_vector(_bias: Tensor, matrix: Tensor, *_: object) -> float:
    """``b + A x``."""
    return 2 * matrix.numel()


_FORMULAS: dict[str, Callable[..., float]] = {
    "linalg_inv_ex": _inverse,
    "linalg_lu_factor_ex": _lu,
    "linalg_lu_solve": _lu_solve,
    "_linalg_solve_ex": _solve,
    "linalg_solve_triangular": _triangular,
    "linalg_cholesky_ex": _cholesky,
    "_fft_c2c": _fourier,
    "_fft_r2c": _fourier,
    "_fft_c2r": _to_real,
    "mv": _vector,
    "dot": _vector,
    "addmv": _added_vector,
}
