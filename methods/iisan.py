"""IISAN (Fu et al., SIGIR 2024): side networks within and across modalities, beside frozen encoders."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.items import Reads
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, TaskShape
from tpme.methods.parts.side_network import SideConfig, SideNetwork, side_parameters


def side_levels(depth: int) -> tuple[int, ...]:
    """Levels of the hidden states that the towers read: the embeddings and every second layer back from the last.

    12 layers give 0, 2, 4, 6, 8, 10, 12 (the outputs of layers 1, 3, 5, 7, 9, 11).
    """
    return (0, *sorted(range(depth, 0, -2)))


class IISAN(Method):
    """Trains side networks on every second hidden state of frozen encoders: one per modality, one across both.

    ``s <- SANB(g h + (1-g) s), SANB(x) = x + W_up act(W_down x)`` in an intra tower,
    ``s <- SANB(s + g h_image + (1-g) h_text)`` in the inter tower (section 3), over pooled states h; one block per
    level, gate g = sigmoid(p / 0.1), s_0 = 0, p_0 = 0. Each tower has a head D -> D -> d; their outputs (image, text,
    inter) are concatenated and projected to d. The inter tower needs encoders of equal width and depth. With the
    sequential encoder 4,113,877 parameters train, with intra towers only 2,776,014, with the inter tower only
    1,438,151.

    Trains: towers, heads and fusion: 4,013,653 beside BERT-base and ViT-B/16.
    Saves: training time and memory, because no gradient enters the encoders, whose states can be cached, and stored
    size; inference costs the towers more than frozen encoders.
    Source: Fu et al., IISAN, SIGIR 2024.
    """

    Config = SideConfig
    config: SideConfig
    decoupled = True

    def item_encoder(self, task: TaskShape) -> SideNetwork:
        """The side network, instead of the default projection and fusion."""
        check_towers("iisan", self.config, task)
        if self.config.inter and len(task.encoders) == 2:
            _check_alike(task)
        reads = {m: Reads(side_levels(shape.depth), pool=shape.pool) for m, shape in task.encoders.items()}
        return SideNetwork(task, self.config, reads, hidden=None)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Those of the side network, with K levels and a head D -> D -> d a tower."""
        levels = {modality: len(side_levels(shape.depth)) for modality, shape in task.encoders.items()}
        return side_parameters(task, self.config, levels)


def check_towers(name: str, config: SideConfig, task: TaskShape) -> None:
    """Raise UserError where method ``name`` would have no tower: one modality, and only the inter tower in use."""
    if not config.intra and len(task.encoders) < 2:
        raise UserError(f"method '{name}' with intra = false needs a text and an image encoder; this cell has one")


def _check_alike(task: TaskShape) -> None:
    text, image = task.encoders["text"], task.encoders["image"]
    if text.width != image.width or len(side_levels(text.depth)) != len(side_levels(image.depth)):
        raise UserError(
            f"method 'iisan': its inter tower needs encoders of equal width and depth; text has {text.depth} layers of "
            f"{text.width}, image {image.depth} of {image.width}; set inter = false, use method 'iisan-versa' or "
            "choose other encoders"
        )
