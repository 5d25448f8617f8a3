"""Parallel adapters as experts, weighted for every item by a router (DyT's mixture of adapter experts)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.methods.parts.token_mask import TokenMask

Mixing = Literal["merge", "mix"]


def expert_parameters(width: int, bottleneck: int, experts: int) -> int:
    """Parameters of E experts with their router: E (2 D b + b + D) + D E; one expert has no router."""
    return experts * (2 * width * bottleneck + bottleneck + width) + (width * experts if experts > 1 else 0)


class AdapterExperts(nn.Module):
    """E adapters ``A_e(x) = s (drop(relu(x W_down,e + b_down,e)) W_up,e + b_up,e)``, weighted by item.

    ``alpha = softmax(mean_tokens(x) W_r)``, (n, E), over the item's real tokens. ``merge``: one adapter an item with
    the weights and biases ``sum_e alpha_e W_e``, at the cost of one adapter and of the merging. ``mix``:
    ``sum_e alpha_e A_e(x)``, at E times the cost. No term balances the experts.

    Initialised as ``ParallelBottleneck`` is; the router with N(0, 0.02).

    Args:
        width: D. bottleneck: b. scale: s. dropout: of the activation. experts: E. mixing: of the experts. tokens: of
            the encoder.
    """

    def __init__(
        self, width: int, bottleneck: int, scale: float, dropout: float, experts: int, mixing: Mixing, tokens: TokenMask
    ) -> None:
        super().__init__()
        self.scale, self.dropout, self.mixing, self.tokens = scale, dropout, mixing, tokens
        self.down = nn.Parameter(torch.empty(experts, bottleneck, width))
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up = nn.Parameter(torch.zeros(experts, width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        self.router = nn.Linear(width, experts, bias=False)
        nn.init.trunc_normal_(self.router.weight, std=0.02)
        for weight in self.down:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, T, D) to (n, T, D)."""
        alpha = self._shares(x)
        return self.scale * (self._merged(x, alpha) if self.mixing == "merge" else self._mixed(x, alpha))

    def _shares(self, x: Tensor) -> Tensor:
        """The weight of every expert, (n, E)."""
        real = self.tokens.value
        if real is None:
            real = x.new_ones(x.shape[:2])
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # padding has no real token
        shares: Tensor = self.router(mean).softmax(-1)
        return shares

    def _merged(self, x: Tensor, alpha: Tensor) -> Tensor:
        down, up = ((alpha @ part.flatten(1)).view(len(x), *part.shape[1:]) for part in (self.down, self.up))
        hidden = self._activated(x @ down.mT + (alpha @ self.down_bias)[:, None])
        return hidden @ up.mT + (alpha @ self.up_bias)[:, None]

    def _mixed(self, x: Tensor, alpha: Tensor) -> Tensor:
        """All experts side by side; scaling the activation by alpha scales what W_up makes of it."""
        hidden = self._activated(functional.linear(x, self.down.flatten(0, 1), self.down_bias.flatten()))
        experts = hidden.view(*x.shape[:2], *self.down_bias.shape)  # (n, T, E, b)
        weighed = (experts * alpha[:, None, :, None]).flatten(-2)
        up = self.up.transpose(0, 1).flatten(1)  # (D, E b)
        return functional.linear(weighed, up) + (alpha @ self.up_bias)[:, None]

    def _activated(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden.relu(), self.dropout, self.training)
