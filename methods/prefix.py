"""Prefix tuning (Li and Liang, ACL 2021): trained keys and values in the attention of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView, Heads
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.attention import Attended, extend_attention


class PrefixConfig(MethodConfig):
    """Number P of keys and values a layer, whether they train through an MLP, and its hidden width h."""

    length: PositiveInt = 16
    reparameterised: bool = False
    hidden: PositiveInt = 512


class PrefixEncoder(nn.Module):
    """The MLP that makes all prefixes from one table: ``tanh(E W_1 + b_1) W_2 + b_2``, E (P, D), W_2 (h, L 2 H_kv d_h).

    W_2 is stored by layer. E starts at N(0, 1), the linear layers as torch initialises them.
    """

    def __init__(self, view: EncoderView, length: int, hidden: int) -> None:
        super().__init__()
        width, heads = view.shape.width, view.heads
        self.shape = (length, 2, heads.key_value, heads.width)
        self.table = nn.Parameter(torch.randn(length, width))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.ModuleList(nn.Linear(hidden, _width(heads)) for _ in view.layers)

    def forward(self, layer: int) -> Tensor:
        """Keys and values of a layer, (2, H_kv, P, d_h)."""
        flat: Tensor = self.outer[layer](torch.tanh(self.inner(self.table)))
        return flat.view(self.shape).permute(1, 2, 0, 3)


class Prefix(nn.Module):
    """The keys and values of every layer of an encoder, each (2, H_kv, P, d_h): a table, or what an MLP makes.

    The table starts at N(0, 0.02).
    """

    def __init__(self, view: EncoderView, config: PrefixConfig) -> None:
        super().__init__()
        heads, depth = view.heads, view.shape.depth
        shape = (2, heads.key_value, config.length, heads.width)
        self.encoder = PrefixEncoder(view, config.length, config.hidden) if config.reparameterised else None
        tables = [] if config.reparameterised else [nn.Parameter(0.02 * torch.randn(shape)) for _ in range(depth)]
        self.layers = nn.ParameterList(tables)

    def vectors(self, layer: int) -> Tensor:
        """Keys and values of a layer, (2, H_kv, P, d_h)."""
        made: Tensor = self.layers[layer] if self.encoder is None else self.encoder(layer)
        return made

    @torch.no_grad()
    def tables(self) -> list[Tensor]:
        """Keys and values of all layers, without a graph."""
        return [
            self.vectors(layer) for layer in range(len(self.layers if self.encoder is None else self.encoder.outer))
        ]

    def fold(self) -> None:
        """Drop the MLP and keep what it makes."""
        if self.encoder is not None:
            self.layers = nn.ParameterList(nn.Parameter(table.contiguous()) for table in self.tables())
            self.encoder = None


class PrefixTuning(Method):
    """Adds trained keys and values to the attention of every layer of the frozen encoders.

    ``softmax(q [P_K; K]^T / sqrt(d_h)) [P_V; V]``: P_K, P_V (H_kv, P, d_h) of each layer, in front of the keys and
    values of each item, in both encoders (section 4). They take no position, so those of the item's tokens stay; no
    mask hides them. Even zero keys take a share of the attention, so training does not start at the frozen encoder.

    With ``reparameterised``, all of them are made from one table E (P, D) by an MLP (``PrefixEncoder``), which is
    neither stored nor run at inference. The paper trains this way, because its language models did not train stably
    without it; Liu et al. (P-Tuning v2, ACL 2022) found no consistent gain for encoders. Here the MLP trains 9,861,632
    parameters an encoder instead of 294,912, so the keys and values train directly by default. Reconstruction: the
    prefix of an image encoder, and P = 16.

    Trains: P_K and P_V of all layers (P = 16): 294,912 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; every layer attends to P more keys, in training and at
    inference, because a prefix cannot be merged.
    Source: Li and Liang, Prefix-Tuning, ACL 2021.
    """

    Config = PrefixConfig
    config: PrefixConfig
    identity_at_start = False

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Extend the attention of every layer. Raises UserError where an encoder computes it in another way."""
        for view in model.views.values():
            prefix = Prefix(view, self.config)
            view.module.add_module("prefix", prefix)
            for layer in range(view.shape.depth):
                # A partial, not a closure: a deep copy of the model then runs its own copy of the prefix.
                extend_attention(view, layer, partial(prepend, prefix, layer))

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """With K = 2 H_kv d_h: L P K, or P D + (D h + h) + L (h K + K) through the MLP."""
        return sum(self._prefix_parameters(view) for view in views.values()) + fusion_parameters(task)

    def _prefix_parameters(self, view: EncoderView) -> int:
        length, hidden, width, depth = self.config.length, self.config.hidden, view.shape.width, view.shape.depth
        made = _width(view.heads)
        if not self.config.reparameterised:
            return depth * length * made
        return length * width + (width * hidden + hidden) + depth * (hidden * made + made)

    def prepare_inference(self, model: Recommender) -> None:
        """Drop the MLPs."""
        fold(model)

    def state(self, model: Recommender) -> dict[str, Tensor]:
        """What trains, with the keys and values in place of the MLP."""
        state = super().state(model)
        for root, prefix in prefixes(model).items():
            state = {name: value for name, value in state.items() if not name.startswith(f"{root}.")}
            state |= {f"{root}.layers.{layer}": table.detach() for layer, table in enumerate(prefix.tables())}
        return state

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Load a ``state``, in which there is no MLP, and drop the model's."""
        fold(model)
        super().load_state(model, state)


def prefixes(model: Recommender) -> dict[str, Prefix]:
    """The prefix of every encoder, by its name in the model."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Prefix)}


def fold(model: Recommender) -> None:
    """Drop the MLPs of all prefixes."""
    for prefix in prefixes(model).values():
        prefix.fold()


def _width(heads: Heads) -> int:
    """Width of one key and one value of all heads, K = 2 H_kv d_h."""
    return 2 * heads.key_value * heads.width


def prepend(prefix: Prefix, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Attended:
    """Prepend the prefix to the keys and values of every item; every query attends to it."""
    own_key, own_value = prefix.vectors(layer).to(key.dtype)[:, None].expand(-1, len(key), -1, -1, -1)
    if mask is not None:
        shown = True if mask.dtype == torch.bool else 0.0
        mask = nn.functional.pad(mask, (own_key.shape[2], 0), value=shown)
    return query, torch.cat([own_key, key], dim=2), torch.cat([own_value, value], dim=2), mask
