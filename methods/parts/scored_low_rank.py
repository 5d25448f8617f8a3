"""A low-rank update of a frozen linear layer that knows how important it is, and the mask of a layer's input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.methods.parts.token_mask import TokenMask


class ScoredLowRank(nn.Module):
    """``y = W x + b + s B A dropout(x)``: (..., in) -> (..., out); A (r, in) Kaiming-uniform, B (out, r) zero.

    Args:
        linear: W and b, which stay frozen. rank: r. scale: s, which stays when ranks are cut. dropout: of the update's
            input. tokens: the mask of the encoder's running batch.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float, tokens: TokenMask) -> None:
        super().__init__()
        self.linear, self.scale, self.tokens = linear, scale, tokens
        self.dropout = nn.Dropout(dropout)
        outputs, inputs = linear.weight.shape
        self.down = nn.Parameter(linear.weight.new_empty(rank, inputs))
        self.up = nn.Parameter(linear.weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.merged = False
        self.scored = False
        """Whether forward passes keep the ratio that ``observe`` reads."""
        self._ratio: Tensor | None = None
        self._sums: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., in), to (..., out)."""
        out: Tensor = self.linear(x)
        if self.merged:
            return out
        change = functional.linear(functional.linear(self.dropout(x), self.down) * self.scale, self.up)
        if self.scored and self.training:
            self._keep_ratio(change.detach(), out.detach())
        return out + change

    def _keep_ratio(self, change: Tensor, out: Tensor) -> None:
        """Keep the mean over the items' own tokens of ``|s B A x| / |W x + b|``, a scalar."""
        real = self.tokens.value
        if real is not None and real.shape != out.shape[:-1]:
            return  # not tokens: embeddings of relative positions (DeBERTa)
        size, whole = (torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in (change, out))
        ratio = size / whole
        self._ratio = ratio.mean() if real is None else torch.where(real, ratio, 0.0).sum() / real.sum()

    @torch.no_grad()
    def observe(self) -> None:
        """Add this step's importance, while its gradients are there; what is not finite counts as 0.

        Of the update: the ratio of the forward pass. Of rank j: ``|mean_i A_ji dA_ji| + |mean_o B_oj dB_oj|``.
        """
        assert self._ratio is not None
        assert self.down.grad is not None
        assert self.up.grad is not None
        ranks = (self.down * self.down.grad).mean(1).abs() + (self.up * self.up.grad).mean(0).abs()
        step = torch.cat([self._ratio[None], ranks.float()]).nan_to_num(0.0, 0.0, 0.0)
        self._sums = step if self._sums is None else self._sums + step

    def importance(self) -> Tensor:
        """(1 + r,): the importance of the update and of its ranks, summed over the observed steps; ends the scoring."""
        assert self._sums is not None
        sums, self.scored, self._ratio, self._sums = self._sums, False, None, None
        return sums

    def keep_ranks(self, index: Tensor) -> None:
        """Keep the ranks ``index``, (k,) int64."""
        self.down = nn.Parameter(self.down.detach()[index])
        self.up = nn.Parameter(self.up.detach()[:, index])

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to W and drop it."""
        if not self.merged:
            self.linear.weight += self.scale * self.up @ self.down
            self.merged = True
            del self.up, self.down


class MaskedInput(nn.Module):
    """``y = inner(m x)``: one trained factor for every ``width`` neighbouring channels of x, (..., in); 1 at the start.

    Args:
        inner: a linear layer, with its update if it has one. count: the number of factors. width: in / count.
    """

    def __init__(self, inner: Any, count: int, width: int) -> None:
        super().__init__()
        self.inner, self.width = inner, width
        self.mask = nn.Parameter(next(inner.parameters()).new_ones(count))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., in), to (..., out)."""
        mask = self.mask.to(x.dtype)
        out: Tensor = self.inner(x * (mask.repeat_interleave(self.width) if self.width > 1 else mask))
        return out
