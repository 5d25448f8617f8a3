"""Context-PEFT (Hadji-Kyriacou and Arandjelovic, 2023): image tokens inside titles, adaptors for each token domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.items import Items, Reads, TokenStates
from tpme.bench.task.recommender import ItemEncoder, Recommender, group
from tpme.bench.task.sequential import init_linear
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape
from tpme.methods.parts.contexts import Adaptors, ContextBias, ContextLoRA, InputScale, MixedSequence, OutputScale
from tpme.methods.parts.insertion import insert_tokens


class ContextPEFTConfig(MethodConfig):
    """Kind of the adaptors, and whether text and image tokens have their own (``specific``) or share them.

    rank: of ``lora``. grid: patches are averaged to at most grid x grid image tokens; ``None`` keeps all. dropout: of
    the image tokens before their projection.
    """

    kind: Literal["lora", "bitfit", "ia3"] = "lora"
    contexts: Literal["specific", "agnostic"] = "specific"
    rank: PositiveInt = 8
    grid: PositiveInt | None = 7
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


# --- the mixed sequence ---------------------------------------------------------------------------------------------


def image_patches(states: Tensor, grid: int | None) -> Tensor:
    """The patches of an image encoder's tokens, averaged to at most ``grid`` x ``grid``.

    Args:
        states: (n, T, D); the last s^2 of them, the largest square in T, are the patches, row by row. Before them come
            the class token and registers, at most 2 s. grid: g; ``None``, or g >= s: all patches.

    Returns:
        (n, g^2, D), means over adaptive windows (2 x 2 patches where s = 2 g); or (n, s^2, D).
    """
    side = math.isqrt(states.shape[1])
    patches = states[:, -side * side :]
    if grid is None or grid >= side:
        return patches
    square = patches.reshape(len(patches), side, side, -1).permute(0, 3, 1, 2)  # channels last in memory
    return functional.adaptive_avg_pool2d(square, grid).flatten(2).transpose(1, 2)


class MixedItemEncoder(ItemEncoder):
    """Projects image tokens to the width of the text encoder, and the text encoder's state to the item vector.

    The head is ``TokenFusion``'s of one modality, ``gelu(W x)``, with the recommender's learning rate; the projection
    has the method's.
    """

    group = "recommender"

    def __init__(self, task: TaskShape, config: ContextPEFTConfig) -> None:
        text, image = task.encoders["text"], task.encoders["image"]
        super().__init__({"text": Reads(final=True, pool=text.pool), "image": Reads(final=True, tokens="all")})
        self.grid, self.sequence = config.grid, MixedSequence()
        self.dropout, self.project = nn.Dropout(config.dropout), nn.Linear(image.width, text.width)
        self.head = nn.Linear(text.width, task.dim)
        init_linear(self.project)
        init_linear(self.head)
        group(self.project, "method")

    def image_tokens(self, states: TokenStates) -> Tensor:
        """Map an image encoder's final state, (n, 1, T, D_image), to image tokens (n, P, D_text)."""
        self.sequence.counts["image_states"] = states.states.shape[2]
        tokens: Tensor = self.project(self.dropout(image_patches(states.states[:, 0], self.grid)))
        return tokens

    def forward(self, states: Mapping[Modality, Tensor], ids: Tensor) -> Tensor:
        """Map the text encoder's final state, (n, 1, D), to item vectors (n, d)."""
        vectors: Tensor = functional.gelu(self.head(states["text"][:, 0]))
        return vectors


# --- the method -----------------------------------------------------------------------------------------------------


class ContextPEFT(Method):
    """Inserts image tokens into the title, inside the text encoder, and gives each token domain its own adaptors.

    ``y = W x + sum_c s_c B_c A_c x``, s the one-hot context of a token (0 title, 1 image); ``bitfit`` ``y + b_c``;
    ``ia3`` ``l_c * y`` on keys and values and ``l_c`` on the feed-forward activation. The sequence is
    ``[x_0, image tokens, x_1 ..]``: the final states of the image encoder's patches, averaged to ``grid`` x ``grid``,
    after dropout and a trained linear projection. LoRA and biases are on every linear layer of the text encoder.
    All weights of both encoders stay frozen; the image encoder's states can be cached. The item vector is ``gelu(W h)``
    of the text encoder's state, read as that encoder is meant to be (BERT: token 0): the default head, and no fusion.

    In the last layer only keys and values have an image adaptor: nothing else of image tokens is read there. With
    ``contexts = agnostic`` every token has the same adaptor; keys then get no bias, which would change no attention.
    Trained adaptors, specific (agnostic): LoRA 2,568,192 (1,327,104), BitFit 160,512 (73,728), IA3 107,520 (55,296).
    Reconstruction: the paper adapts a decoder for captions. Image tokens enter after the embeddings, so they pass
    neither the text encoder's positions nor its embedding norm; where a patch lies is in the image encoder's states.
    The head is ours: with a linear one, all item vectors became nearly equal in 40 steps (the demo's data, lr 1e-3).

    Trains: adaptors (LoRA, r = 8): 2,568,192 in BERT-base; projection of image tokens: 590,592.
    Saves: weight gradients, the backward pass of the image encoder (cached, also its forward pass) and stored size;
    training and inference run 49 more tokens through the text encoder, and only agnostic adaptors can be merged.
    Source: Hadji-Kyriacou and Arandjelovic, Context-PEFT, arXiv 2312.08900, 2023.
    """

    Config = ContextPEFTConfig
    config: ContextPEFTConfig
    needs = ("text", "image")
    identity_at_start = False

    def item_encoder(self, task: TaskShape) -> MixedItemEncoder:
        """The projection of image tokens and the head."""
        return MixedItemEncoder(task, self.config)

    def frozen_encoders(self, modalities: Sequence[Modality]) -> tuple[Modality, ...]:
        """The image encoder is only read."""
        return tuple(modality for modality in modalities if modality == "image")

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Insert image tokens into the text encoder and attach the adaptors to its linear layers."""
        view, item_encoder = model.views["text"], model.item_encoder
        assert isinstance(item_encoder, MixedItemEncoder)
        insert_tokens(view, item_encoder.sequence, "context-peft")
        parts = nn.ModuleList()
        for linear, role, contexts in self._places(view):
            part = self._adaptors(linear, role, contexts, item_encoder.sequence)
            part.attach(linear)
            parts.append(part)
        view.module.add_module("context_adaptors", parts)

    def _places(self, view: EncoderView) -> Iterator[tuple[nn.Linear, Role, int]]:
        """The adapted linear layers, their roles, and how many contexts have an adaptor of their own there."""
        for role in self._roles(view):
            for layer, name in enumerate(view.projections(role)):
                unread = layer == view.shape.depth - 1 and role not in ("key", "value")
                linear = view.module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                yield linear, role, 1 if unread or self.config.contexts == "agnostic" else 2

    def _roles(self, view: EncoderView) -> tuple[Role, ...]:
        if self.config.kind == "ia3":
            return ("key", "value", "ffn_out")
        without = "key" if (self.config.kind, self.config.contexts) == ("bitfit", "agnostic") else None
        return tuple(role for role in view.family.layer.roles if role != without)

    def _adaptors(self, linear: nn.Linear, role: Role, contexts: int, sequence: MixedSequence) -> Adaptors:
        if self.config.kind == "lora":
            return ContextLoRA(linear, contexts, sequence, self.config.rank)
        if self.config.kind == "bitfit":
            return ContextBias(linear, contexts, sequence)
        return (InputScale if role == "ffn_out" else OutputScale)(linear, contexts, sequence)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """``C L P - unread``, the projection ``D_image D + D`` and the head ``D d + d``.

        P: of one adaptor on each linear layer of a layer, r (in + out), out, or one vector a key, value and activation.
        unread: with C = 2, the part of P in the last layer that is not on keys and values.
        """
        view = views["text"]
        sizes = {role: self._size(view, role) for role in self._roles(view)}
        adaptors, width = view.shape.depth * sum(sizes.values()), view.shape.width
        if self.config.contexts == "specific":
            adaptors = 2 * adaptors - sum(size for role, size in sizes.items() if role not in ("key", "value"))
        return adaptors + (task.encoders["image"].width + 1) * width + (width + 1) * task.dim

    def _size(self, view: EncoderView, role: Role) -> int:
        """Parameters of one adaptor of a linear layer with this role."""
        width, ffn, heads = view.shape.width, view.ffn_width, view.heads
        inside = {"attention_output": heads.number * heads.width, "ffn_out": ffn}.get(role, width)
        shared = heads.key_value * heads.width
        outside = {"query": heads.number * heads.width, "key": shared, "value": shared, "ffn_in": ffn, "ffn_gate": ffn}
        out = outside.get(role, width)
        if self.config.kind == "lora":
            return self.config.rank * (inside + out)
        return inside if (self.config.kind, role) == ("ia3", "ffn_out") else out

    def encode(self, model: Recommender, items: Items) -> Tensor:
        """Item vectors (n, d): the text encoder runs on titles with image tokens in them."""
        item_encoder = model.item_encoder
        assert isinstance(item_encoder, MixedItemEncoder)
        images = model.states("image", items)
        assert isinstance(images, TokenStates)
        item_encoder.sequence.images = item_encoder.image_tokens(images)
        try:
            states = model.states("text", items)
        finally:
            item_encoder.sequence.images = None
        vectors: Tensor = item_encoder({"text": states}, items.ids)
        return vectors

    def prepare_inference(self, model: Recommender) -> None:
        """Merge adaptors that all tokens share; those of a context cannot be merged."""
        if self.config.contexts == "specific":
            return
        view = model.views["text"]
        parts: Any = view.module.get_submodule("context_adaptors")
        for (linear, _, _), part in zip(self._places(view), parts, strict=True):
            part.fold(linear)
            part.merged = True

    def report(self, model: Recommender) -> dict[str, float]:
        """Tokens of an item in the last forward pass: image encoder, inserted image tokens, and the (padded) title."""
        item_encoder = model.item_encoder
        assert isinstance(item_encoder, MixedItemEncoder)
        return dict(item_encoder.sequence.counts)
