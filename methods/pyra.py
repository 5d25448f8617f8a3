"""PYRA (Xiong et al., ECCV 2024): LoRA in encoders that merge similar tokens from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.recommender import Recommender, group
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.low_rank import check_rank
from tpme.methods.parts.merging import (
    TokenMerging,
    explicit_targets,
    install_merging,
    scaled_targets,
    token_counts,
)

_QKV: tuple[Role, ...] = ("query", "key", "value")
_POSITIONS_IN_LAYERS = ("deberta-v2", "mpnet", "modernbert", "llama", "dinov3_vit")
_TEXT_FLOOR = 8


class PYRAConfig(MethodConfig):
    """LoRA's rank and dropout, and the schedules of both encoders.

    schedule: how many tokens each layer of the image encoder removes: ``low`` or ``high``, scaled to its tokens and
        layers, or one number a layer. text_merge: the same for the text encoder, for the longest title; by default
        titles keep all tokens.
    """

    rank: PositiveInt = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    schedule: Literal["low", "high"] | tuple[NonNegativeInt, ...] = "low"
    text_merge: Literal["none", "low", "high"] | tuple[NonNegativeInt, ...] = "none"


class SharedLoRA(nn.Module):
    """``[q k v] = W x + B A x`` with one A (r, D), Kaiming-uniform, and a stacked B (q + k + v widths, r), zero.

    Args:
        width: D. outputs: widths of q, k and v. rank: r. dropout: of the input.
    """

    def __init__(self, width: int, outputs: list[int], rank: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(sum(outputs), rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.outputs, self.dropout, self.merged = outputs, nn.Dropout(dropout), False
        self._running: tuple[Tensor, Tensor, set[int]] | None = None
        """x, A x, and which of q, k and v have had them."""

    def part(self, place: int) -> Tensor:
        """The rows of B for q, k or v (0, 1, 2)."""
        start = sum(self.outputs[:place])
        return self.up[start : start + self.outputs[place]]

    def forward(self, place: int, x: Tensor, output: Tensor) -> Tensor:
        """Add q's, k's or v's update to the output (..., width) of its projection of ``x`` (..., D)."""
        if self.merged:
            return output
        if self._running is None or self._running[0] is not x:  # the three read the same x: one A x, one dropout
            self._running = x, functional.linear(self.dropout(x), self.down), set()
        _, low, served = self._running
        served.add(place)
        if len(served) == len(self.outputs):  # in any order, which differs between versions of transformers
            self._running = None
        added = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.part(place).t())
        return added.view_as(output)


class PYRA(Method):
    """Merges similar tokens in every layer, after rescaling them by learned weights, and adapts the encoders with LoRA.

    ``t <- (n_t t + sum n_s s') / (n_t + sum n_s), s' = s (1 + dD dr)``: between the halves of each layer, the r_l most
    similar pairs (source s, target t) of bipartite soft matching on the mean keys merge, weighted by their sizes n, the
    numbers of tokens that they stand for. The re-activation s' has a weight a channel, ``dD = 2 sigmoid(W_r M)``, and
    one a pair, ``dr = 2 sigmoid(M W_D) - 1``, with ``M = LN(n_s s + n_t t)``; W_D starts at 0, so at first this is LoRA
    with plain merging. Later attention adds log n to its scores. Token 0 stays where it is; a mean over tokens is
    weighted by their sizes. The last layer merges without re-activation, which token 0 would not learn from. LoRA
    adapts q, k and v of both encoders, with one A and no scale.

    Reconstruction: B of LoRA starts at zero, and the re-activation has a learning rate of its own (group ``pyra``), as
    the paper says and its code does not do. Schedules are scaled to other encoders along the curve of the kept tokens.
    The paper adapts images only: titles (``text_merge``) keep at least 8 tokens, and their padding has size 0, is
    dropped first, and changes nothing.

    Trains: LoRA (r = 8): 294,912 each in BERT-base and ViT-B/16; re-activation: 25,520 in ViT-B/16.
    Saves: FLOPs of the image encoder in training and at inference, about half with ``low`` and 70 % with ``high``, and
    stored size; LoRA is merged, and titles keep all tokens by default.
    Source: Xiong et al., PYRA, ECCV 2024; Bolya et al., Token Merging, ICLR 2023.
    """

    Config = PYRAConfig
    config: PYRAConfig
    groups = ("pyra",)
    identity_at_start = False

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Add LoRA to q, k and v of both encoders, and merge tokens where a schedule says so."""
        for view in model.views.values():
            check_rank("pyra", self.config.rank, view, _QKV)
            plan = self._plan(view, schedule.title_tokens)
            shared = nn.ModuleList()
            for names in _by_layer(view):
                linears: list[Any] = [view.module.get_submodule(name) for name in names]
                outputs = [linear.out_features for linear in linears]
                lora = SharedLoRA(linears[0].in_features, outputs, self.config.rank, self.config.dropout)
                for place, linear in enumerate(linears):
                    linear.register_forward_hook(partial(_update, lora, place))
                shared.append(lora)
            view.module.add_module("shared_lora", shared)
            if plan is not None:
                merging = install_merging(view, *plan)
                view.module.add_module("pyra", merging)
                group(merging, "pyra")

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """LoRA: r (D + widths of q, k, v) a layer. Gates: 3 D and r_l of every layer that merges, but the last."""
        total = fusion_parameters(task)
        for view in views.values():
            shape, heads = view.shape, view.heads
            outputs = (heads.number + 2 * heads.key_value) * heads.width
            total += shape.depth * self.config.rank * (shape.width + outputs)
            plan = self._plan(view, task.title_tokens)
            if plan is not None:
                removed = [before - after for before, after in pairwise(token_counts(*plan))][:-1]
                total += sum(3 * shape.width + r for r in removed if r)
        return total

    def prepare_inference(self, model: Recommender) -> None:
        """Merge B A into the weights of q, k and v; tokens go on merging."""
        for view in model.views.values():
            shared: Any = view.module.get_submodule("shared_lora")
            for names, lora in zip(_by_layer(view), shared, strict=True):
                for place, name in enumerate(names):
                    with torch.no_grad():
                        view.module.get_parameter(f"{name}.weight").add_(lora.part(place) @ lora.down)
                lora.merged = True

    def report(self, model: Recommender) -> dict[str, float]:
        """Tokens after every layer of an encoder that merges, in the last forward pass: ``image_tokens_1`` ..."""
        return {
            f"{modality}_tokens_{part.layer + 1}": part.tokens
            for modality, view in model.views.items()
            for part in view.module.modules()
            if isinstance(part, TokenMerging) and part.tokens is not None
        }

    def _plan(self, view: EncoderView, title_tokens: int) -> tuple[list[int], int, int] | None:
        """Tokens to keep after each layer, tokens before the first, and how many never merge; ``None``: no merging.

        Raises UserError where tokens cannot merge in the encoder, or the schedule does not fit it.
        """
        modality, depth = view.modality, view.shape.depth
        chosen = self.config.schedule if modality == "image" else self.config.text_merge
        if chosen == "none":
            return None
        _check_mergeable(view)
        tokens = _image_tokens(view) if modality == "image" else title_tokens
        protected = int(modality == "text" or "first" in view.family.pools)
        if isinstance(chosen, str):
            floor = 1 if modality == "image" else _TEXT_FLOOR
            return scaled_targets(chosen, tokens, depth, protected=protected, floor=floor), tokens, protected
        option = "schedule" if modality == "image" else "text_merge"
        if len(chosen) != depth:
            raise UserError(
                f"method 'pyra': {option} has {len(chosen)} numbers, but the {modality} encoder has {depth} layers; "
                "give one number a layer, or 'low' or 'high'"
            )
        if sum(chosen) >= tokens:
            raise UserError(
                f"method 'pyra': {option} removes {sum(chosen)} tokens, but the {modality} encoder reads {tokens}, of "
                "which one must stay; lower its numbers"
            )
        return explicit_targets(chosen, tokens, protected), tokens, protected


def _update(lora: SharedLoRA, place: int, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    updated: Tensor = lora(place, args[0], output)
    return updated


def _by_layer(view: EncoderView) -> list[list[str]]:
    """The names of q, k and v in every layer."""
    names = view.projections(*_QKV)
    return [names[start : start + len(_QKV)] for start in range(0, len(names), len(_QKV))]


def _image_tokens(view: EncoderView) -> int:
    """The tokens of an image: its patches, and what the encoder puts before them."""
    config = view.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    special = int("first" in view.family.pools) + int(config.model_type == "deit")  # a distillation token
    return int(height // config.patch_size) * int(width // config.patch_size) + special


def _check_mergeable(view: EncoderView) -> None:
    """Raise UserError where a merged token has no place: positions inside the layers, causal attention, last tokens."""
    causal = any(getattr(part, "is_causal", False) is True for part in view.module.modules())
    if view.config.model_type in _POSITIONS_IN_LAYERS or causal or view.family.whole or view.pool == "last":
        raise UserError(
            f"method 'pyra': tokens of the {view.modality} encoder {type(view.module).__name__} cannot merge, because "
            "its layers use their positions or its last token is read; choose another encoder"
            + (", or text_merge = 'none'" if view.modality == "text" else "")
        )
