"""Prompt tuning (Jia et al., ECCV 2022; Lester et al., EMNLP 2021): trained vectors among the tokens of every layer.

Visual prompt tuning for images; for text, soft prompts at the same place, after token 0. The positions of all real
tokens stay as they are where an encoder adds them to its embeddings. Prompts are never read: pooling leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.insertion import insert_tokens


class PromptConfig(MethodConfig):
    """Number of prompt vectors per encoder (per layer, if deep), and whether every layer has its own."""

    length: PositiveInt = 10
    deep: bool = True


class Prompts(nn.Module):
    """P trained vectors after token 0, inserted before layer 0 and, if ``deep``, replaced before every later layer.

    Sequence at layer 0: ``[x_0, p_1 .. p_P, x_1 .. x_{N-1}]``. A deep layer replaces the P slots, so the length stays
    N + P. Initialised uniformly within sqrt(6 / (fan + D)), fan = 3 patch^2 (VPT), or D without patches.
    """

    def __init__(self, view: EncoderView, length: int, deep: bool) -> None:
        super().__init__()
        width, depth = view.shape.width, view.shape.depth if deep else 1
        patch = getattr(view.module.config, "patch_size", None)
        bound = math.sqrt(6 / ((3 * int(patch) ** 2 if patch else width) + width))
        self.length = length
        self.vectors = nn.Parameter(torch.empty(depth, length, width))
        nn.init.uniform_(self.vectors, -bound, bound)

    def insert(self, hidden: Tensor) -> Tensor:
        """Map (n, N, D) to (n, N+P, D): insert layer 0's prompts after token 0."""
        prompts = self.vectors[0].expand(len(hidden), -1, -1).to(hidden.dtype)
        return torch.cat([hidden[:, :1], prompts, hidden[:, 1:]], dim=1)

    def replace(self, layer: int, hidden: Tensor) -> Tensor:
        """Map (n, N+P, D) to the same shape: replace the P slots by this layer's prompts."""
        prompts = self.vectors[layer].expand(len(hidden), -1, -1).to(hidden.dtype)
        return torch.cat([hidden[:, :1], prompts, hidden[:, 1 + self.length :]], dim=1)


class PromptTuning(Method):
    """Inserts trained vectors after token 0 of the frozen encoders, in every layer.

    ``[x_0, p_1 .. p_P, x_1 .. x_{N-1}]``, P vectors of width D before layer 0 and, if ``deep``, others in the same
    places before every later layer. They are never read: pooling leaves them out. The image encoder follows Jia et al.;
    the text encoder has the soft prompts of Lester et al. at the same place.

    Trains: the vectors of all layers (P = 10): 92,160 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; training and inference run P more tokens through each
    encoder.
    Source: Jia et al., Visual Prompt Tuning, ECCV 2022; Lester et al., The Power of Scale for Parameter-Efficient
    Prompt Tuning, EMNLP 2021.
    """

    Config = PromptConfig
    config: PromptConfig
    identity_at_start = False

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Insert prompts after token 0 of each encoder."""
        for view in model.views.values():
            prompts = Prompts(view, self.config.length, self.config.deep)
            view.module.add_module("prompts", prompts)
            insert_tokens(view, prompts, "prompt")
            if self.config.deep:
                for i, layer in enumerate(view.layers[1:], start=1):
                    layer.register_forward_pre_hook(partial(_replace, prompts, i))

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """P vectors of width D, in each of L layers if they are deep."""
        shapes = [view.shape for view in views.values()]
        vectors = sum((shape.depth if self.config.deep else 1) * shape.width for shape in shapes)
        return self.config.length * vectors + fusion_parameters(task)


def _replace(prompts: Prompts, layer: int, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return prompts.replace(layer, args[0]), *args[1:]
