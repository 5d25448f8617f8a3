"""A branch beside the feed-forward sub-layer of an encoder's layer, and the bottleneck usually used as that branch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from tpme.bench.task.view import EncoderView


def add_parallel(view: EncoderView, layer: int, branch: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the output f of a layer's feed-forward sub-layer, before the residual is added, by ``branch(x, f)``.

    In a pre-norm layer ``y = x + f`` becomes ``y = x + branch(x, f)`` with ``f = FFN(LN(x))``; in a post-norm one
    ``y = LN(x + f)`` becomes ``y = LN(x + branch(x, f))`` with ``f = FFN(x)``.

    Args:
        branch: maps x and f, (n, T, width) each, to (n, T, width). x is the input of the feed-forward half: the
            residual stream of a pre-norm encoder, normalised states of a post-norm one. A module, which the method
            registers in the encoder, or a partial over one; not a closure, which a deep copy of the model would share.
    """
    taken: list[Tensor] = []
    view.insert_between(layer, partial(_take, taken))
    _, output = view.sublayer_outputs(layer)
    output.register_forward_hook(partial(_replace, branch, taken))


def _take(taken: list[Tensor], hidden: Tensor) -> Tensor:
    taken[:] = [hidden]
    return hidden


def _replace(
    branch: Callable[[Tensor, Tensor], Tensor],
    taken: list[Tensor],
    _module: nn.Module,
    _args: object,
    output: Tensor,
) -> Tensor:
    return branch(taken.pop(), output)  # popped: a kept activation would prevent a deep copy of the model


class ParallelBottleneck(nn.Module):
    """``A(x) = s (drop(relu(x W_down + b_down)) W_up + b_up)``, without a residual (AdaptFormer, He et al. 2022).

    W_down starts Kaiming-uniform (a = sqrt 5); W_up and both biases start at zero, so A(x) = 0.

    Args:
        width: D. bottleneck: b. scale: s. dropout: of the activation.
    """

    def __init__(self, width: int, bottleneck: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation, self.dropout = nn.ReLU(), nn.Dropout(dropout)
        self.scale = scale
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.scale * self.up(self.dropout(self.activation(self.down(x))))
        return out
