"""A sequence of tokens of two domains in one encoder, and adaptors of a linear layer for each domain."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional


class MixedSequence:
    """The sequence in the text encoder: ``[x_0, image tokens, x_1 .. x_{T-1}]``, and the context of each position.

    images: (n, P, D), while the text encoder runs. hot: (T+P, 2) bool, one-hot contexts of the last forward pass, text
    first; kept after it, because layers that are recomputed in the backward pass read it. counts: numbers of tokens.
    """

    def __init__(self) -> None:
        self.images: Tensor | None = None
        self.hot: Tensor = torch.zeros(0, 2, dtype=torch.bool)
        self.counts: dict[str, float] = {}

    @property
    def length(self) -> int:
        """P, the number of image tokens."""
        return 0 if self.images is None else self.images.shape[1]

    def insert(self, hidden: Tensor) -> Tensor:
        """Map the text's hidden state 0, (n, T, D), to (n, T+P, D), and set the contexts."""
        self.counts |= {"text_tokens": hidden.shape[1], "image_tokens": self.length}
        position = torch.arange(hidden.shape[1] + self.length, device=hidden.device)
        image = (position >= 1) & (position <= self.length)
        self.hot = torch.stack([~image, image], dim=1)
        if self.images is None:
            return hidden
        return torch.cat([hidden[:, :1], self.images.to(hidden.dtype), hidden[:, 1:]], dim=1)


class Adaptors(nn.Module):
    """The adaptors of a linear layer ``y = W x + b``, one per context, or one for all tokens.

    Args:
        contexts: C, 1 or 2. sequence: holds the contexts of the tokens.
    """

    def __init__(self, contexts: int, sequence: MixedSequence) -> None:
        super().__init__()
        self.contexts, self.sequence, self.merged = contexts, sequence, False

    def rows(self, vectors: Tensor, like: Tensor) -> Tensor:
        """The vector of each token's context, of ``vectors`` (C, D): (T, D), or (D,) for one context."""
        if self.contexts == 1:
            return vectors[0].to(like.dtype)
        return torch.where(self.sequence.hot[:, 1:], vectors[1], vectors[0]).to(like.dtype)

    def attach(self, linear: nn.Linear) -> None:
        """Apply the adaptors to the layer's output; by a partial, so that a deep copy runs its own."""
        linear.register_forward_hook(partial(_change_output, self))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, (n, T, D_out), from the layer's input x, (n, T, D_in), and output y."""
        raise NotImplementedError

    def fold(self, linear: nn.Linear) -> None:
        """Change the weights of the layer as the one adaptor of all tokens does."""
        raise NotImplementedError


class ContextLoRA(Adaptors):
    """``y + sum_c s_c B_c A_c x``, s the one-hot context of the token; A Kaiming-uniform, B zero.

    Computed as one product of rank C r, ``(x [A_0|A_1] * repeat(s, r)) [B_0;B_1]``. Slicing the sequence by context
    would halve these FLOPs, but copies x and y, which takes longer at small ranks and more memory.
    """

    def __init__(self, linear: nn.Linear, contexts: int, sequence: MixedSequence, rank: int) -> None:
        super().__init__(contexts, sequence)
        self.down = nn.Parameter(torch.empty(contexts * rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, contexts * rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the low-rank change."""
        inner = functional.linear(x, self.down)
        if self.contexts > 1:
            apart = inner.view(*inner.shape[:-1], self.contexts, -1) * self.sequence.hot[:, :, None]
            inner = apart.flatten(-2)
        return y + functional.linear(inner, self.up)

    def fold(self, linear: nn.Linear) -> None:
        """``W + B A``."""
        linear.weight.data += self.up.data @ self.down.data


class ContextBias(Adaptors):
    """``y + b_c``, a second bias that starts at zero."""

    def __init__(self, linear: nn.Linear, contexts: int, sequence: MixedSequence) -> None:
        super().__init__(contexts, sequence)
        self.vectors = nn.Parameter(torch.zeros(contexts, linear.out_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bias of each token's context."""
        return y + self.rows(self.vectors, y)

    def fold(self, linear: nn.Linear) -> None:
        """``b + b_0``; a layer without bias gets one."""
        bias = self.vectors.data[0] + (0 if linear.bias is None else linear.bias.data)
        linear.bias = nn.Parameter(bias, requires_grad=False)


class OutputScale(Adaptors):
    """``l_c * y``; l starts at one."""

    def __init__(self, linear: nn.Linear, contexts: int, sequence: MixedSequence) -> None:
        super().__init__(contexts, sequence)
        self.vectors = nn.Parameter(torch.ones(contexts, linear.out_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scale the output by the vector of each token's context."""
        return y * self.rows(self.vectors, y)

    def fold(self, linear: nn.Linear) -> None:
        """``l W`` and ``l b``, by rows."""
        linear.weight.data *= self.vectors.data[0][:, None]
        if linear.bias is not None:
            linear.bias.data *= self.vectors.data[0]


class InputScale(Adaptors):
    """``W (l_c * x) + b``; l starts at one."""

    def __init__(self, linear: nn.Linear, contexts: int, sequence: MixedSequence) -> None:
        super().__init__(contexts, sequence)
        self.vectors = nn.Parameter(torch.ones(contexts, linear.in_features))

    def attach(self, linear: nn.Linear) -> None:
        """Apply the scale to the layer's input."""
        linear.register_forward_pre_hook(partial(_change_input, self))

    def scaled(self, x: Tensor) -> Tensor:
        """Scale the input (n, T, D_in) by the vector of each token's context."""
        return x * self.rows(self.vectors, x)

    def fold(self, linear: nn.Linear) -> None:
        """``W l``, by columns."""
        linear.weight.data *= self.vectors.data[0]


def _change_output(adaptors: Adaptors, _linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    changed: Tensor = output if adaptors.merged else adaptors(args[0], output)
    return changed


def _change_input(adaptors: InputScale, _linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args if adaptors.merged else (adaptors.scaled(args[0]), *args[1:])
