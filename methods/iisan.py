"""IISAN (Fu et al., SIGIR 2024): decoupled intra- and inter-modal side adapted networks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.items import Reads
from tpme.bench.task.recommender import ORDER, ItemEncoder
from tpme.bench.task.sequential import init_linear
from tpme.methods.base import Method, MethodConfig, TaskShape
from tpme.methods.parts.bottleneck import Activation, Bottleneck


class IISANConfig(MethodConfig):
    """Bottleneck of the SANBs, gate temperature, activation, and which towers there are."""

    bottleneck: PositiveInt = 64
    temperature: PositiveFloat = 0.1
    activation: Activation = "relu"
    intra: bool = True
    inter: bool = True

    @model_validator(mode="after")
    def _has_a_tower(self) -> IISANConfig:
        if not (self.intra or self.inter):
            raise ValueError("with intra and inter both off nothing is left")
        return self


def side_levels(depth: int) -> tuple[int, ...]:
    """Which hidden states the towers read: the embeddings and every second layer counted back from the last.

    12 layers give 0, 2, 4, 6, 8, 10, 12 (the outputs of layers 1, 3, 5, 7, 9, 11).
    """
    return (0, *sorted(range(depth, 1, -2)))


class Tower(nn.Module):
    """A stack of K SANBs, one a level, with a learned gate before each.

    Gates start at ``sigmoid(0 / T) = 0.5``; a SANB is a ``Bottleneck``.
    """

    def __init__(self, levels: int, width: int, config: IISANConfig) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.blocks = nn.ModuleList(Bottleneck(width, config.bottleneck, config.activation) for _ in range(levels))
        self.gates = nn.Parameter(torch.zeros(levels))

    def intra(self, states: Tensor) -> Tensor:
        """``s <- SANB(g h + (1-g) s)``, s_0 = 0: (n, K, D) states of one modality to (n, D)."""
        gates = torch.sigmoid(self.gates / self.temperature)
        side = torch.zeros_like(states[:, 0])
        for k, block in enumerate(self.blocks):
            side = block(torch.lerp(side, states[:, k], gates[k]))
        return side

    def inter(self, image: Tensor, text: Tensor) -> Tensor:
        """``s <- SANB(s + g h_image + (1-g) h_text)``, s_0 = 0: two times (n, K, D) to (n, D)."""
        gates = torch.sigmoid(self.gates / self.temperature)
        side = torch.zeros_like(image[:, 0])
        for k, block in enumerate(self.blocks):
            side = block(side + torch.lerp(text[:, k], image[:, k], gates[k]))
        return side


class SideNetwork(ItemEncoder):
    """Intra towers per modality and one inter tower; each ends in D -> D -> d; concatenated (image, text, inter) -> d."""

    def __init__(self, task: TaskShape, config: IISANConfig) -> None:
        super().__init__({m: Reads(side_levels(shape.depth)) for m, shape in task.encoders.items()})
        self.order = [modality for modality in ORDER if modality in task.encoders]
        names: list[str] = list(self.order) if config.intra else []
        widths = {modality: task.encoders[modality].width for modality in self.order}
        if config.inter and len(self.order) == 2:
            _check_alike(task)
            names.append("inter")
            widths["inter"] = widths["image"]  # type: ignore[index]
        if not names:
            raise UserError("method 'iisan' with intra=false needs a text and an image encoder; this cell has one")
        levels = len(self.reads[self.order[0]].levels)
        counts = {name: len(self.reads[name].levels) if name in self.reads else levels for name in names}  # type: ignore[index]
        self.towers = nn.ModuleDict({n: Tower(counts[n], widths[n], config) for n in names})  # type: ignore[index]
        self.heads = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(widths[n], widths[n]), nn.Linear(widths[n], task.dim)) for n in names}  # type: ignore[index]
        )
        self.fusion = nn.Linear(task.dim * len(names), task.dim) if len(names) > 1 else nn.Identity()
        for module in (*self.heads.modules(), self.fusion):
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        """Map states, (n, K, D) per modality, to item vectors (n, d)."""
        sides = {
            name: tower.inter(states["image"], states["text"]) if name == "inter" else tower.intra(states[name])  # type: ignore[index, operator]
            for name, tower in self.towers.items()
        }
        vectors: Tensor = self.fusion(torch.cat([self.heads[name](side) for name, side in sides.items()], dim=1))
        return vectors


def _check_alike(task: TaskShape) -> None:
    text, image = task.encoders["text"], task.encoders["image"]
    if text.width != image.width or len(side_levels(text.depth)) != len(side_levels(image.depth)):
        raise UserError(
            f"method 'iisan': its inter tower needs encoders of one width and depth; text is {text.depth} layers of "
            f"{text.width}, image {image.depth} of {image.width}; set inter = false or choose other encoders"
        )


class IISAN(Method):
    """Side networks over token 0 of every second hidden state; the encoders are never trained through.

    Trainable at BERT-base + ViT-B/16, bottleneck 64: 4,113,877 with the recommender's own parts (intra only
    2,776,014, inter only 1,438,151). Because nothing flows back into the encoders, their hidden states can be cached:
    ``cached = true`` in a cell gives the cached twin.
    """

    Config = IISANConfig
    config: IISANConfig
    decoupled = True

    def item_encoder(self, task: TaskShape) -> SideNetwork:
        """The side network in place of the default projection and fusion."""
        return SideNetwork(task, self.config)
