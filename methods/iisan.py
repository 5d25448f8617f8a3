"""IISAN (Fu et al., SIGIR 2024): decoupled intra- and inter-modal side adapted networks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.recommender import ORDER, ItemEncoder
from tpme.bench.task.sequential import init_linear
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, TaskShape
from tpme.methods.parts.bottleneck import Activation, Bottleneck, bottleneck_parameters


class IISANConfig(MethodConfig):
    """Bottleneck width of the SANBs, gate temperature, activation, and the towers in use."""

    bottleneck: PositiveInt = 64
    temperature: PositiveFloat = 0.1
    activation: Activation = "relu"
    intra: bool = True
    inter: bool = True

    @model_validator(mode="after")
    def _require_a_tower(self) -> IISANConfig:
        if not (self.intra or self.inter):
            raise ValueError("intra and inter cannot both be false")
        return self


def side_levels(depth: int) -> tuple[int, ...]:
    """Levels of the hidden states that the towers read: the embeddings and every second layer back from the last.

    12 layers give 0, 2, 4, 6, 8, 10, 12 (the outputs of layers 1, 3, 5, 7, 9, 11).
    """
    return (0, *sorted(range(depth, 0, -2)))


class Tower(nn.Module):
    """K stacked SANBs (``Bottleneck``), one per level, each after a gate ``g = sigmoid(p / T)``; p starts at 0."""

    def __init__(self, shape: EncoderShape, config: IISANConfig) -> None:
        super().__init__()
        levels = len(side_levels(shape.depth))
        self.width, self.temperature = shape.width, config.temperature
        self.blocks = nn.ModuleList(
            Bottleneck(shape.width, config.bottleneck, config.activation) for _ in range(levels)
        )
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


class SideNetwork(ItemEncoder):
    """An intra tower per modality and an inter tower, each with a head D -> D -> d; their outputs are fused.

    Order of concatenation: image, text, inter.
    """

    def __init__(self, task: TaskShape, config: IISANConfig) -> None:
        shapes = {modality: task.encoders[modality] for modality in ORDER if modality in task.encoders}
        super().__init__(
            {modality: Reads(side_levels(shape.depth), pool=shape.pool) for modality, shape in shapes.items()}
        )
        towers: dict[str, Tower] = {}
        if config.intra:
            towers.update((modality, IntraTower(shape, config)) for modality, shape in shapes.items())
        if config.inter and len(shapes) == 2:
            _check_alike(task)
            towers["inter"] = InterTower(shapes["image"], config)
        if not towers:
            raise UserError("method 'iisan' with intra = false needs a text and an image encoder; this cell has one")
        self.towers = nn.ModuleDict(towers)
        self.heads = nn.ModuleDict({name: Head(tower.width, task.dim) for name, tower in towers.items()})
        self.fusion = nn.Linear(task.dim * len(towers), task.dim) if len(shapes) > 1 else nn.Identity()
        for module in (*self.heads.modules(), self.fusion):
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        """Map states, (n, K, D) per modality, to item vectors (n, d)."""
        vectors: Tensor = self.fusion(torch.cat(list(self.head_outputs(states).values()), dim=1))
        return vectors

    def head_outputs(self, states: Mapping[Modality, Tensor]) -> dict[str, Tensor]:
        """Output of each tower's head, (n, d), in the order of concatenation."""
        sides: dict[str, Tensor] = {m: self.towers[m](states[m]) for m in self.reads if m in self.towers}
        if "inter" in self.towers:
            sides["inter"] = self.towers["inter"](states["image"], states["text"])
        return {name: self.heads[name](side) for name, side in sides.items()}


class Head(nn.Sequential):
    """Two linear layers D -> D -> d without activation, as released: ``W_2 (W_1 x + b_1) + b_2``.

    For n > d items their product ``(W_2 W_1) x + (W_2 b_1 + b_2)`` is cheaper: D D d + n D d multiply-adds instead of
    n (D D + D d). Both layers are trained and stored.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(nn.Linear(width, width), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, D) to (n, d)."""
        first, last = self
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        if len(x) <= last.out_features:
            plain: Tensor = last(first(x))
            return plain
        return functional.linear(x, last.weight @ first.weight, functional.linear(first.bias, last.weight, last.bias))


def _check_alike(task: TaskShape) -> None:
    text, image = task.encoders["text"], task.encoders["image"]
    if text.width != image.width or len(side_levels(text.depth)) != len(side_levels(image.depth)):
        raise UserError(
            f"method 'iisan': its inter tower needs encoders of equal width and depth; text has {text.depth} layers of "
            f"{text.width}, image {image.depth} of {image.width}; set inter = false or choose other encoders"
        )


class IISAN(Method):
    """Side networks over every second hidden state, pooled; no gradients flow through the encoders.

    Trainable at BERT-base + ViT-B/16, bottleneck 64: 4,113,877 with the recommender's own parts (intra only
    2,776,014, inter only 1,438,151). Because the encoders get no gradients, their hidden states can be cached
    (``cached = true`` in a matrix).
    """

    Config = IISANConfig
    config: IISANConfig
    decoupled = True

    def item_encoder(self, task: TaskShape) -> SideNetwork:
        """The side network, instead of the default projection and fusion."""
        return SideNetwork(task, self.config)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Towers of K levels, K (2 D b + b + D) + K each, their heads D D + D + D d + d, and the fusion of t towers."""
        both, dim = len(task.encoders) == 2, task.dim
        shapes = list(task.encoders.values()) if self.config.intra else []
        shapes += [task.encoders["image"]] if self.config.inter and both else []
        total = (len(shapes) * dim * dim + dim) if both else 0
        for shape in shapes:
            width, levels = shape.width, len(side_levels(shape.depth))
            total += levels * (bottleneck_parameters(width, self.config.bottleneck) + 1)
            total += width * width + width + width * dim + dim
        return total
