"""LST (Sung et al., NeurIPS 2022): a narrow transformer beside each frozen encoder, fed by its hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.items import EncoderShape, Reads, TokenStates
from tpme.bench.task.pooling import pool_tokens
from tpme.bench.task.recommender import ItemEncoder, Recommender, TokenFusion, group
from tpme.bench.task.sequential import init_linear
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, TaskShape, fusion_parameters

DROP_EVERY = 4
"""By default every fourth layer from the first has no side layer: layers 0, 4 and 8 of 12, as in the paper."""

NARROWEST = 8
"""Least width of a side network: LayerNorm over very few numbers leaves little information."""


class LSTConfig(MethodConfig):
    """Sizes of the side network, the layers without a side layer, gate temperature, dropout and initialisation.

    reduction: how many times narrower the side network is than its encoder. dropped: layers of both encoders, from 0;
    by default every fourth.
    """

    reduction: PositiveInt = 8
    dropped: tuple[NonNegativeInt, ...] | None = None
    temperature: PositiveFloat = 0.1
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    init: Literal["magnitude", "random"] = "magnitude"


def side_width(shape: EncoderShape, config: LSTConfig) -> int:
    """The width w of the side network of an encoder: D/r, rounded down, but not below ``NARROWEST``."""
    return max(shape.width // config.reduction, NARROWEST)


def kept_layers(depth: int, config: LSTConfig) -> tuple[int, ...]:
    """The layers of an encoder with ``depth`` layers that have a side layer."""
    dropped = range(0, depth, DROP_EVERY) if config.dropped is None else config.dropped
    return tuple(layer for layer in range(depth) if layer not in dropped)


class SideLayer(nn.Module):
    """``s <- s + W_o Attn(LN s)``, ``s <- s + W_2 gelu(W_1 LN s)``, w wide, feed-forward 4 w, biases everywhere."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.attention_output = nn.Linear(width, width)
        self.ffn_in, self.ffn_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, side: Tensor, mask: Tensor | None, read: Tensor | None = None) -> Tensor:
        """The states after the layer.

        Args:
            side: (n, T, w), all tokens. mask: (n, 1, 1, T) bool, the tokens to attend to; ``None``: all.
            read: (n, Q, w), the tokens of ``side`` whose states are wanted; ``None``: all.

        Returns:
            (n, Q, w).
        """
        normed = self.attention_norm(side)
        asked = normed if read is None else self.attention_norm(read)
        key, value = self.key_value(normed).chunk(2, dim=-1)
        mixed = functional.scaled_dot_product_attention(
            self._split(self.query(asked)), self._split(key), self._split(value), attn_mask=mask
        )
        out = self._drop(self.attention_output(mixed.transpose(1, 2).flatten(2)))
        side = (side if read is None else read) + out
        return side + self._drop(self.ffn_out(functional.gelu(self.ffn_in(self.ffn_norm(side)))))

    def _split(self, x: Tensor) -> Tensor:
        """(n, T, w) -> (n, H, T, w/H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class Ladder(nn.Module):
    """The side network of one encoder: K side layers, a gate and a down-projection before each, W_up at the end."""

    def __init__(self, shape: EncoderShape, config: LSTConfig) -> None:
        super().__init__()
        kept, width = kept_layers(shape.depth, config), side_width(shape, config)
        self.reads = Reads((0, *(layer + 1 for layer in kept)), pool=shape.pool, tokens="all")
        self.temperature, self.dropout = config.temperature, config.dropout
        self.down = nn.ModuleList(nn.Linear(shape.width, width) for _ in range(len(kept) + 1))
        self.layers = nn.ModuleList(SideLayer(width, shape.heads, config.dropout) for _ in kept)
        self.gates = nn.Parameter(torch.zeros(len(kept)))
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, shape.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def gate_values(self) -> Tensor:
        """The gates g of all side layers, (K,), in (0, 1)."""
        return torch.sigmoid(self.gates / self.temperature)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Map the states of every token, (n, K+1, T, D), under ``mask`` (n, T), ``None``: all, to (n, D)."""
        embedded = functional.dropout(states[:, 0], self.dropout, self.training)
        side = self.down[0](embedded)
        gates, pool = self.gate_values().to(side.dtype), self.reads.pool
        visible = None if mask is None else mask[:, None, None]
        for k, layer in enumerate(self.layers):
            side = torch.lerp(self.down[k + 1](states[:, k + 1]), side, gates[k])
            last = k == len(self.layers) - 1 and pool != "mean"
            side = layer(side, visible, pool_tokens(side, mask, pool)[:, None] if last else None)
        pooled = side[:, 0] if pool != "mean" else pool_tokens(side, mask, pool)
        vector: Tensor = self.up(self.norm(pooled))
        return vector


class Ladders(ItemEncoder):
    """A side network per encoder, and the task's head and fusion in place of the encoders' last states."""

    def __init__(self, task: TaskShape, config: LSTConfig) -> None:
        for modality, shape in task.encoders.items():
            _check(modality, shape, config)
        ladders = {modality: Ladder(shape, config) for modality, shape in task.encoders.items()}
        super().__init__({modality: ladder.reads for modality, ladder in ladders.items()})
        self.ladders = nn.ModuleDict({str(modality): ladder for modality, ladder in ladders.items()})
        self.fusion = TokenFusion(task.encoders, task.dim)
        group(self.fusion, "recommender")

    def forward(self, states: Mapping[Modality, TokenStates], ids: Tensor) -> Tensor:
        """Map the states of every token to item vectors (n, d)."""
        sides: dict[Modality, Tensor] = {}
        for modality, read in states.items():
            # All tokens of an image are real, and without a mask attention has its fastest kernel.
            mask = read.mask if modality == "text" else None
            sides[modality] = self.ladders[modality](read.states, mask)[:, None]
        vectors: Tensor = self.fusion(sides, ids)
        return vectors


def _check(modality: Modality, shape: EncoderShape, config: LSTConfig) -> None:
    """Raise UserError for sizes that cannot be built on an encoder of this ``shape``."""
    outside = [layer for layer in config.dropped or () if layer >= shape.depth]
    if outside:
        raise UserError(
            f"method 'lst', dropped: the {modality} encoder has no layer {outside[0]}; its layers are 0 to "
            f"{shape.depth - 1}"
        )
    if not kept_layers(shape.depth, config):
        raise UserError(
            f"method 'lst': 'dropped' names all {shape.depth} layers of the {modality} encoder, so none has a side "
            "layer; leave one out"
        )
    width = side_width(shape, config)
    if width % shape.heads:
        raise UserError(
            f"method 'lst': beside the {modality} encoder, reduction = {config.reduction} gives a side network of "
            f"width {width}, which its {shape.heads} heads do not divide; choose a reduction that divides "
            f"{shape.width // shape.heads}"
        )


class LST(Method):
    """Trains a narrow transformer beside each frozen encoder, which reads the hidden states of every token.

    ``s <- SideLayer(g s + (1-g) W_down b), g = sigmoid(a / T)`` from ``s_0 = W_down Drop(e)``; e are the embeddings and
    b the output of a kept layer, of every token; a starts at 0. The item is ``W_up LN(s)`` of the pooled token, then
    the head and fusion of the task (section 3). Side layers are D/r wide with the encoder's number of heads, attend to
    all real tokens in both directions, and are pre-norm beside every encoder: the paper's T5 is, and a sum of gated
    residual streams has no norm of its own. The last one is computed for the pooled token alone, unless that is the
    mean.

    With ``init = "magnitude"`` the side layers start from the encoder's weights, structurally pruned by |W|: of the
    residual stream those D/r dimensions that the layers' query, key, value and feed-forward weights read most; of each
    head and of the feed-forward width those inner dimensions whose weights on them are largest (for a head: the product
    over query, key and value). Reconstruction: one set of dimensions for all layers, the same share of every head,
    down-projections that start as the selection of these dimensions, norms at 1 and 0, no gate in the feed-forward part
    and 4 D/r in place of a narrower F/r. The paper's Fisher importance is left out, because it needs gradients of the
    encoders, which a cached cell does not load.

    Trains: side networks: 1,819,497 each beside BERT-base and ViT-B/16.
    Saves: training time and memory, because no gradient enters the encoders, whose states can be cached (every token:
    71 GB for 20,314 items), and stored size; inference costs the side networks more than frozen encoders.
    Source: Sung et al., LST, NeurIPS 2022.
    """

    Config = LSTConfig
    config: LSTConfig
    decoupled = True
    identity_at_start = False

    def item_encoder(self, task: TaskShape) -> Ladders:
        """The side networks, instead of the default projection and fusion."""
        return Ladders(task, self.config)

    def initial_state(self, views: Mapping[Modality, EncoderView]) -> dict[str, Tensor]:
        """The pruned weights of the encoders, for the side layers and their down-projections."""
        if self.config.init == "random":
            return {}
        return {
            f"ladders.{modality}.{name}": value
            for modality, view in views.items()
            for name, value in pruned_state(view, self.config)
        }

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """K (12 w w + 13 w + 1) + (K + 1) (D w + w) + 2 w + w D + D, w = D/r, K kept layers; head and fusion."""
        total = fusion_parameters(task)
        for shape in task.encoders.values():
            width, kept = side_width(shape, self.config), len(kept_layers(shape.depth, self.config))
            total += kept * (12 * width * width + 13 * width + 1) + (kept + 1) * (shape.width + 1) * width
            total += 2 * width + (width + 1) * shape.width
        return total

    def report(self, model: Recommender) -> dict[str, float]:
        """The mean gate of each side network; at 1, no hidden state but the embeddings would feed it."""
        assert isinstance(model.item_encoder, Ladders)
        gates = {modality: ladder.get_parameter("gates") for modality, ladder in model.item_encoder.ladders.items()}
        return {
            f"gate_{m}": float(torch.sigmoid(a.detach() / self.config.temperature).mean()) for m, a in gates.items()
        }


# --- structural pruning -----------------------------------------------------------------------------------------------


def pruned_state(view: EncoderView, config: LSTConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a ``Ladder``, by name, that start from the weights of its encoder; see ``LST``.

    Raises UserError for an encoder whose heads or feed-forward activation are narrower than those of a side layer.
    """
    shape, heads = view.shape, view.heads
    width = side_width(shape, config)
    if view.ffn_width < 4 * width:
        raise UserError(
            f"method 'lst': the feed-forward part of the {view.modality} encoder is {view.ffn_width} wide, that of a "
            f"side layer would be {4 * width}; raise reduction or set init = 'random'"
        )
    if heads.width * heads.number < width:
        raise UserError(
            f"method 'lst': the heads of the {view.modality} encoder are {heads.width * heads.number} wide together, "
            f"the side network would be {width}; raise reduction or set init = 'random'"
        )
    layers = [_weights(view, layer) for layer in range(shape.depth)]
    reading = torch.stack([weight.abs().sum(0) for layer in layers for weight, _ in layer[:4]]).sum(0)
    stream = _largest(reading, width)  # the dimensions of the residual stream, (w,)
    kept = kept_layers(shape.depth, config)
    selection = torch.eye(shape.width, device=stream.device)[stream]
    for k in range(len(kept) + 1):
        yield f"down.{k}.weight", selection
    for k, layer in enumerate(kept):
        inputs, (output, output_bias), (ffn_out, ffn_bias) = layers[layer][:4], *layers[layer][4:]
        query, key, value, ffn_in = ((weight[:, stream], bias) for weight, bias in inputs)
        joint = torch.stack([weight.abs().sum(1) for weight, _ in (query, key, value)]).prod(0)
        inner = _largest(joint.view(heads.number, heads.width), width // heads.number)
        first = torch.arange(heads.number, device=inner.device)[:, None] * heads.width
        rows, wide = (inner + first).flatten(), _largest(ffn_in[0].abs().sum(1), 4 * width)
        parts = {
            "query": (query[0][rows], query[1][rows]),
            "key_value": tuple(torch.cat([a[rows], b[rows]]) for a, b in zip(key, value, strict=True)),
            "attention_output": (output[stream][:, rows], output_bias[stream]),
            "ffn_in": (ffn_in[0][wide], ffn_in[1][wide]),
            "ffn_out": (ffn_out[stream][:, wide], ffn_bias[stream]),
        }
        for name, (weight, bias) in parts.items():
            yield f"layers.{k}.{name}.weight", weight
            yield f"layers.{k}.{name}.bias", bias


def _weights(view: EncoderView, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of a layer's query, key, value, ffn_in, attention_output and ffn_out, in float32 on the host.

    Key-value heads that several heads share are repeated for each of them. On the host, because another device rounds
    sums differently and might choose other dimensions.
    """
    heads, found = view.heads, []
    for role in ("query", "key", "value", "ffn_in", "attention_output", "ffn_out"):
        linear = view.module.get_submodule(view.projections(role)[layer])
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()
        weight = weight.float() if weight.is_meta else weight.cpu().float()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().to(weight)
        if role in ("key", "value") and heads.key_value < heads.number:
            weight, bias = (
                part.view(heads.key_value, heads.width, *part.shape[1:])
                .repeat_interleave(heads.number // heads.key_value, dim=0)
                .flatten(0, 1)
                for part in (weight, bias)
            )
        found.append((weight, bias))
    return found


def _largest(importance: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest values of the last dimension, in ascending order."""
    return importance.topk(count, dim=-1).indices.sort(dim=-1).values
