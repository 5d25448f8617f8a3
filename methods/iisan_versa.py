"""IISAN-Versa (Fu et al., 2024): IISAN for encoders of any depth and width, such as a large decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, NonNegativeInt, model_validator

from tpme.bench.errors import UserError
from tpme.bench.record import Modality, Pool
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, TaskShape
from tpme.methods.iisan import check_towers, side_levels
from tpme.methods.parts.side_network import SideConfig, SideNetwork, side_parameters

KEPT = 6
"""Layers that a deep encoder keeps."""
Layers = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


class IISANVersaConfig(SideConfig):
    """As IISAN's, with the pooling of the text and, from 0, the layers that are kept; ``None``: those of the rule."""

    text_pool: Pool | None = None
    """``None``: as the text encoder is meant to be read: a BERT at token 0, a decoder at the mean of its tokens."""
    text_layers: Layers | None = None
    image_layers: Layers | None = None

    @model_validator(mode="after")
    def _ascending(self) -> IISANVersaConfig:
        for layers in (self.text_layers, self.image_layers):
            if layers is not None and list(layers) != sorted(set(layers)):
                raise ValueError(f"layers are listed in ascending order, each once; not {list(layers)}")
        return self


def kept_layers(depth: int) -> tuple[int, ...]:
    """The layers, from 0, whose outputs are kept: with stride ``k = floor((L-2) / 5)``, ``L-1, L-1-k, ..., L-1-5k``.

    12 layers keep 1, 3, 5, 7, 9, 11; 24 keep 3, 7, ..., 23; 32 keep 1, 7, ..., 31; 80 keep 4, 19, ..., 79. Below 7
    layers k is 0, which gives the last layer six times: there every second layer is kept, counted back from the last,
    as in IISAN.
    """
    stride = (depth - 2) // (KEPT - 1)
    if stride < 1:
        return tuple(level - 1 for level in side_levels(depth)[1:])
    return tuple(range(depth - 1 - (KEPT - 1) * stride, depth, stride))


class IISANVersa(Method):
    """Extends IISAN to encoders of any depth and width by selecting layers and aligning widths.

    ``l = L-1-jk, j = 0 .. 5, k = floor((L-2) / 5); h'_l = W_l h_l + b_l``: an encoder of L layers gives its embeddings
    and six layers, counted back from the last with stride k (below 7 layers every second one, as IISAN takes them), and
    a linear layer (DTL, D -> d) narrows each level of the wider encoder on its way into the inter tower. Towers, gates
    and fusion are IISAN's. Where one encoder keeps fewer levels, the inter tower reads the last ones of the other; the
    surplus blocks come first, in the intra tower alone. Heads: intra D -> d -> d, inter D -> D -> d with D the smaller
    width.

    A text is read at token 0, of a decoder at the mean of its tokens without padding (the release averages over
    padding, too); ``text_pool = "last"`` takes the last token. The last level of a text encoder is its last hidden
    state, after the final norm where the encoder has one (Llama's, as transformers returns it; ModernBERT's, CLIP's);
    that of an image encoder is before its final norm, as IISAN reads a ViT. With one modality only its intra tower is
    left. With the sequential encoder 2,941,013 parameters train at BERT-base + ViT-B/16, 8,698,965 with BERT-large,
    28,184,661 with Llama-8B and 54,165,589 with Llama-70B. Reconstruction: DTLs start Xavier-normal with zero biases,
    as the heads do.

    Trains: towers, DTLs, heads and fusion: 2,840,789 beside BERT-base and ViT-B/16.
    Saves: training time and memory, because no gradient enters the encoders, whose states can be cached, and stored
    size; inference costs the towers more than frozen encoders.
    Source: Fu et al., Efficient and Effective Adaptation of Multimodal Foundation Models, arXiv 2411.02992, 2024.
    """

    Config = IISANVersaConfig
    config: IISANVersaConfig
    decoupled = True

    def item_encoder(self, task: TaskShape) -> SideNetwork:
        """The side network, instead of the default projection and fusion."""
        check_towers("iisan-versa", self.config, task)
        reads = {modality: self._reads(modality, shape) for modality, shape in task.encoders.items()}
        return SideNetwork(task, self.config, reads, hidden=task.dim)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Those of the side network, with the embeddings and the kept layers, and heads D -> d -> d."""
        levels = {m: 1 + len(self._layers(m, shape.depth)) for m, shape in task.encoders.items()}
        return side_parameters(task, self.config, levels, task.dim)

    def _layers(self, modality: Modality, depth: int) -> tuple[int, ...]:
        """The kept layers of one encoder, from 0. Raises UserError for a layer that it does not have."""
        layers = self.config.text_layers if modality == "text" else self.config.image_layers
        if layers is None:
            return kept_layers(depth)
        if layers[-1] >= depth:
            raise UserError(
                f"method 'iisan-versa': {modality}_layers names layer {layers[-1]} of an encoder of {depth} layers; "
                f"choose from 0 to {depth - 1}"
            )
        return layers

    def _reads(self, modality: Modality, shape: EncoderShape) -> Reads:
        """The embeddings and the outputs of the kept layers; of a text encoder's last one, after its final norm."""
        layers = self._layers(modality, shape.depth)
        levels = (0, *(layer + 1 for layer in layers))
        pool = (self.config.text_pool if modality == "text" else None) or shape.pool
        normed = modality == "text" and shape.final_norm and levels[-1] == shape.depth
        return Reads(levels[:-1] if normed else levels, final=normed, pool=pool)
