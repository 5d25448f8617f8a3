"""The search space of AutoPEFT: sizes of three kinds of modules, and the layers that get them, of every encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt

from tpme.bench.errors import UserError
from tpme.bench.record import Frozen, Modality
from tpme.bench.task.view import EncoderView
from tpme.methods.parts.bottleneck import bottleneck_parameters

Kind = Literal["serial", "parallel", "prefix"]
KINDS: tuple[Kind, ...] = ("serial", "parallel", "prefix")


class EncoderModules(Frozen):
    """The modules of one encoder.

    serial, parallel: bottleneck widths of the adapters. prefix: keys and values a layer. 0: no module of this kind.
    layers: those that get the modules, counted from 0; by default all.
    """

    serial: NonNegativeInt = 0
    parallel: NonNegativeInt = 0
    prefix: NonNegativeInt = 0
    layers: tuple[NonNegativeInt, ...] | None = None

    @property
    def empty(self) -> bool:
        """Whether no layer gets a module."""
        return self.layers == () or not (self.serial or self.parallel or self.prefix)

    def active(self, depth: int) -> tuple[int, ...]:
        """The layers, of ``depth``, that get a module."""
        if self.empty:
            return ()
        return tuple(range(depth)) if self.layers is None else tuple(sorted(set(self.layers)))


@dataclass(frozen=True)
class EncoderSize:
    """What the modules of an encoder depend on: width D, number of layers, and K = 2 H_kv d_h."""

    width: int
    depth: int
    key_value: int

    @classmethod
    def of(cls, view: EncoderView) -> EncoderSize:
        """The size of an encoder."""
        return cls(view.shape.width, view.shape.depth, 2 * view.heads.key_value * view.heads.width)

    def parameters(self, modules: EncoderModules) -> int:
        """Trained parameters of ``modules``: ``2 D b + b + D`` an adapter and ``P K`` a prefix, in every layer."""
        adapters = sum(bottleneck_parameters(self.width, b) for b in (modules.serial, modules.parallel) if b)
        return len(modules.active(self.depth)) * (adapters + modules.prefix * self.key_value)


Configuration = Mapping[Modality, EncoderModules]
"""The modules by encoder; an encoder that is not named gets none."""
Vector = tuple[int, ...]
"""A configuration as coordinates: per encoder, k of each kind, then one bit a layer."""


def sizes_of(width: int) -> tuple[int, ...]:
    """The sizes of a module, ``floor(D / 2^k)`` down to 1, then 0: 768, 384, 192, 96, 48, 24, 12, 6, 3, 1, 0."""
    return (*(width >> k for k in range(width.bit_length())), 0)


class SearchSpace:
    """All configurations of some encoders.

    A vector holds, for each encoder, k of every kind (its size is ``sizes_of(D)[k]``) and a bit for every layer; the
    kinds of an encoder have one size for all of its layers, and share the bits. At BERT-base, 11^3 2^12 = 5,451,776.

    Args:
        encoders: their sizes. kinds: those that are searched; the others stay 0. shared: one set of coordinates for all
            encoders; of widths that differ, the narrowest sets how often the width can be halved.

    Raises UserError for shared coordinates of encoders whose depths differ.
    """

    def __init__(
        self, encoders: Mapping[Modality, EncoderSize], kinds: Sequence[Kind] = KINDS, *, shared: bool = False
    ) -> None:
        self.encoders, self.kinds = dict(encoders), tuple(dict.fromkeys(kinds))
        depths = {modality: size.depth for modality, size in encoders.items()}
        if shared and len(set(depths.values())) > 1:
            found = ", ".join(f"{modality} {depth}" for modality, depth in depths.items())
            raise UserError(
                f"method 'autopeft': shared = true needs encoders of the same depth, these have {found} layers"
            )
        self.groups: list[tuple[Modality, ...]] = (
            [tuple(encoders)] if shared else [(modality,) for modality in encoders]
        )
        self.sizes: dict[Modality, tuple[int, ...]] = {}
        choices: list[int] = []
        for group in self.groups:
            all_sizes = {modality: sizes_of(encoders[modality].width) for modality in group}
            levels = min(map(len, all_sizes.values()))
            self.sizes |= {modality: (*sizes[: levels - 1], 0) for modality, sizes in all_sizes.items()}
            choices += [levels] * len(self.kinds) + [2] * depths[group[0]]
        self.choices: Vector = tuple(choices)

    def __len__(self) -> int:
        """How many vectors there are, those without any module included."""
        return math.prod(self.choices)

    def decode(self, vector: Sequence[int]) -> dict[Modality, EncoderModules]:
        """The configuration of a vector."""
        found: dict[Modality, EncoderModules] = {}
        left = list(vector)
        for group in self.groups:
            depth, kinds = self.encoders[group[0]].depth, len(self.kinds)
            levels, bits, left = left[:kinds], left[kinds : kinds + depth], left[kinds + depth :]
            layers = tuple(layer for layer, bit in enumerate(bits) if bit)
            for modality in group:
                sizes = {kind: self.sizes[modality][level] for kind, level in zip(self.kinds, levels, strict=True)}
                found[modality] = EncoderModules.model_validate(sizes | {"layers": layers})
        return found

    def encode(self, configuration: Configuration) -> Vector:
        """The vector of a configuration that ``decode`` has made."""
        vector: list[int] = []
        for modality, *_ in self.groups:
            modules = configuration[modality]
            vector += [self.sizes[modality].index(getattr(modules, kind)) for kind in self.kinds]
            vector += [int(layer in (modules.layers or ())) for layer in range(self.encoders[modality].depth)]
        return tuple(vector)

    def parameters(self, vector: Sequence[int]) -> int:
        """Trained parameters of the modules of all encoders."""
        return sum(self.encoders[modality].parameters(modules) for modality, modules in self.decode(vector).items())

    def valid(self, vector: Sequence[int]) -> bool:
        """Whether any encoder gets a module."""
        return self.parameters(vector) > 0

    def middle(self) -> Vector:
        """Middle sizes in all layers."""
        return tuple(choices // 2 for choices in self.choices)

    def unit(self, vectors: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Vectors in the unit cube, (n, coordinates)."""
        steps = np.array(self.choices, dtype=np.float64) - 1
        points: NDArray[np.float64] = np.array(vectors, dtype=np.float64).reshape(len(vectors), -1) / steps
        return points

    def nearest(self, point: NDArray[np.float64]) -> Vector:
        """The vector of a point of the unit cube."""
        return tuple(int(value) for value in np.rint(point * (np.array(self.choices) - 1)))

    def draw(self, random: np.random.Generator) -> Iterator[Vector]:
        """Yield valid vectors, uniformly and without end."""
        while True:
            vector = tuple(int(value) for value in random.integers(self.choices))
            if self.valid(vector):
                yield vector
