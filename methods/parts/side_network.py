"""The side network of IISAN and IISAN-Versa: gated towers of bottlenecks beside frozen encoders, and their heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.record import Modality
from tpme.bench.task.items import Reads
from tpme.bench.task.recommender import ORDER, ItemEncoder
from tpme.bench.task.sequential import init_linear
from tpme.methods.base import MethodConfig, TaskShape
from tpme.methods.parts.bottleneck import Activation, Bottleneck, bottleneck_parameters


class SideConfig(MethodConfig):
    """Bottleneck width of the SANBs, gate temperature, activation, and the towers in use."""

    bottleneck: PositiveInt = 64
    temperature: PositiveFloat = 0.1
    activation: Activation = "relu"
    intra: bool = True
    inter: bool = True

    @model_validator(mode="after")
    def _require_a_tower(self) -> SideConfig:
        if not (self.intra or self.inter):
            raise ValueError("intra and inter cannot both be false")
        return self


class Tower(nn.Module):
    """K stacked SANBs (``Bottleneck``), one per level, each after a gate ``g = sigmoid(p / T)``; p starts at 0."""

    def __init__(self, width: int, levels: int, config: SideConfig) -> None:
        super().__init__()
        self.width, self.temperature = width, config.temperature
        self.blocks = nn.ModuleList(Bottleneck(width, config.bottleneck, config.activation) for _ in range(levels))
        self.gates = nn.Parameter(torch.zeros(levels))

    def gate_values(self) -> Tensor:
        """The gates g of all levels, (K,), in (0, 1)."""
        return torch.sigmoid(self.gates / self.temperature)


class IntraTower(Tower):
    """``s <- SANB(g h + (1-g) s)``, s_0 = 0, over the states h of one modality."""

    def forward(self, states: Tensor) -> Tensor:
        """Map (n, K, D) to (n, D)."""
        first, *gates = self.gate_values()
        side: Tensor = self.blocks[0](first * states[:, 0])
        for k, gate in enumerate(gates, start=1):
            side = self.blocks[k](torch.lerp(side, states[:, k], gate))
        return side


class InterTower(Tower):
    """``s <- SANB(s + g h_image + (1-g) h_text)``, s_0 = 0."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Map image and text states, (n, K, D) each, to (n, D)."""
        first, *gates = self.gate_values()
        side: Tensor = self.blocks[0](torch.lerp(text[:, 0], image[:, 0], first))
        for k, gate in enumerate(gates, start=1):
            side = self.blocks[k](side + torch.lerp(text[:, k], image[:, k], gate))
        return side


class LevelTransform(nn.Module):
    """IISAN-Versa's dimension transformation layers (DTL): a linear layer D -> d for each of K levels."""

    def __init__(self, levels: int, wide: int, narrow: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(wide, narrow) for _ in range(levels))
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            init_linear(linear)

    def forward(self, states: Tensor) -> Tensor:
        """Map (n, K, D) to (n, K, d)."""
        return torch.stack([linear(states[:, k]) for k, linear in enumerate(self.linears)], dim=1)


class Head(nn.Sequential):
    """Two linear layers D -> h -> d without activation, as released: ``W_2 (W_1 x + b_1) + b_2``.

    For many items their product ``(W_2 W_1) x + (W_2 b_1 + b_2)`` is cheaper: d h D + n d D multiply-adds instead of
    n (D h + h d). Both layers are trained and stored.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, D) to (n, d)."""
        first, last = self
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        width, hidden, dim = first.in_features, first.out_features, last.out_features
        if len(x) * (width * hidden + hidden * dim - width * dim) <= width * hidden * dim:
            plain: Tensor = last(first(x))
            return plain
        return functional.linear(x, last.weight @ first.weight, functional.linear(first.bias, last.weight, last.bias))


class SideNetwork(ItemEncoder):
    """An intra tower per modality and an inter tower, each with a head; the outputs of the heads are fused.

    The inter tower reads the last K levels of both encoders, K of the one with fewer, at the width d of the narrower
    one: the states of the wider one pass ``LevelTransform`` on their way into it, and only there.

    Order of concatenation: image, text, inter.

    Args:
        task: sizes of the task. config: of the towers. reads: the levels of each encoder.
        hidden: width between the two layers of an intra tower's head; ``None``: that of the tower, as of the inter
            tower's head.
    """

    def __init__(
        self, task: TaskShape, config: SideConfig, reads: Mapping[Modality, Reads], hidden: int | None
    ) -> None:
        super().__init__({modality: reads[modality] for modality in ORDER if modality in reads})
        widths = {modality: task.encoders[modality].width for modality in self.reads}
        narrow, levels = min(widths.values()), min(read.count for read in self.reads.values())
        towers: dict[str, Tower] = {}
        if config.intra:
            towers.update((m, IntraTower(widths[m], read.count, config)) for m, read in self.reads.items())
        if config.inter and len(widths) == 2:
            towers["inter"] = InterTower(narrow, levels, config)
        self.towers = nn.ModuleDict(towers)
        self.heads = nn.ModuleDict(
            {
                name: Head(tower.width, tower.width if name == "inter" else hidden or tower.width, task.dim)
                for name, tower in towers.items()
            }
        )
        self.fusion = nn.Linear(task.dim * len(towers), task.dim) if len(widths) > 1 else nn.Identity()
        for module in (*self.heads.modules(), self.fusion):
            if isinstance(module, nn.Linear):
                init_linear(module)
        wider = [modality for modality in widths if "inter" in towers and widths[modality] > narrow]
        self.transforms = nn.ModuleDict({m: LevelTransform(levels, widths[m], narrow) for m in wider})

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        """Map states, (n, K, D) per modality, to item vectors (n, d)."""
        vectors: Tensor = self.fusion(torch.cat(list(self.head_outputs(states).values()), dim=1))
        return vectors

    def head_outputs(self, states: Mapping[Modality, Tensor]) -> dict[str, Tensor]:
        """Output of each tower's head, (n, d), in the order of concatenation."""
        sides: dict[str, Tensor] = {m: self.towers[m](states[m]) for m in self.reads if m in self.towers}
        if "inter" in self.towers:
            sides["inter"] = self.towers["inter"](*(self._shared(m, states[m]) for m in ORDER))
        return {name: self.heads[name](side) for name, side in sides.items()}

    def _shared(self, modality: Modality, states: Tensor) -> Tensor:
        """The levels that the inter tower reads, at its width: of (n, K_m, D_m) the last K, (n, K, d)."""
        inter = self.towers["inter"]
        assert isinstance(inter, Tower)
        tail = states[:, -len(inter.blocks) :]
        narrowed: Tensor = self.transforms[modality](tail) if modality in self.transforms else tail
        return narrowed


def side_parameters(
    task: TaskShape, config: SideConfig, levels: Mapping[Modality, int], hidden: int | None = None
) -> int:
    """Parameters of a ``SideNetwork`` that reads so many ``levels`` of each encoder.

    A tower of K levels: K (2 D b + b + D) + K; its head: D h + h + h d' + d'; the transforms: K (D d + d); the fusion
    of t towers: t d' d' + d', with d' the width of item vectors.
    """
    widths, dim = {m: task.encoders[m].width for m in levels}, task.dim
    both = len(widths) == 2
    towers = [(widths[m], levels[m], hidden or widths[m]) for m in levels] if config.intra else []
    total = 0
    if config.inter and both:
        narrow, shared = min(widths.values()), min(levels.values())
        towers.append((narrow, shared, narrow))
        total += sum(shared * (width * narrow + narrow) for width in widths.values() if width > narrow)
    total += (len(towers) * dim * dim + dim) if both else 0
    for width, count, inner in towers:
        total += count * (bottleneck_parameters(width, config.bottleneck) + 1)
        total += width * inner + inner + inner * dim + dim
    return total
