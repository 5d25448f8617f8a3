"""The residual bottleneck shared by adapters and side networks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
Activation = Literal["relu", "gelu"]


def bottleneck_parameters(width: int, bottleneck: int) -> int:
    """Parameters of a ``Bottleneck``: 2 D b + b + D."""
    return 2 * width * bottleneck + bottleneck + width


class Bottleneck(nn.Module):
    """``B(x) = x + W_up act(W_down x)``; weights N(0, 0.01) and zero biases make B nearly the identity at the start.

    Houlsby et al. (ICML 2019) insert it into an encoder; IISAN's SANB (SIGIR 2024, section 3) stacks it beside one.

    Args:
        width: D of the states. bottleneck: b. activation: ``relu`` (as released) or ``gelu``.
    """

    def __init__(self, width: int, bottleneck: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation = ACTIVATIONS[activation]()
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return x + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """``W_up act(W_down x)``, what is added to x: (..., D) to (..., D)."""
        out: Tensor = self.up(self.activation(self.down(x)))
        return out
