"""PT-PEFT (Kim et al., EMNLP Findings 2024): a prefix first, then LoRA, adapters or all weights together with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender, group
from tpme.bench.task.view import EncoderView
from tpme.methods.adapter import AdapterConfig, HoulsbyAdapter
from tpme.methods.base import Method, Schedule, Stage, StepState, TaskShape, fusion_parameters
from tpme.methods.fft import FullFineTuning
from tpme.methods.lora import LoRA, LoRAConfig
from tpme.methods.parts.bottleneck import Bottleneck
from tpme.methods.parts.low_rank import check_rank
from tpme.methods.prefix import PrefixConfig, PrefixTuning, fold, prefixes

SECOND: dict[str, type[Method]] = {"lora": LoRA, "adapter": HoulsbyAdapter, "all": FullFineTuning}


class PTPEFTConfig(PrefixConfig, LoRAConfig, AdapterConfig):
    """Options of the prefix, of LoRA and of adapters; what joins the prefix in stage 2; stage 1's share of epochs."""

    then: Literal["lora", "adapter", "all"] = "lora"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25


class PTPEFT(PrefixTuning):
    """Trains a prefix first, then LoRA, adapters or all weights together with it.

    ``softmax(W_q x [P_K; W_k x]^T / sqrt(d_h)) [P_V; W_v x]; in stage 2 W + (alpha / r) B A``: stage 1 is ``prefix``,
    which keeps the rank of the hidden states; in stage 2 ``lora``, ``adapter`` or ``fft`` joins it, with the same
    options and a new optimiser. Nothing changes at the switch: B is zero, and so are the adapters' up-projections here.
    The prefix trains at the rate ``lr.groups.prefix`` in both stages. Reconstruction: of the paper only the order of
    the stages is known. Their lengths (``share``), P, h and the learning rates are ours, and so is a prefix of keys and
    values in each layer: a summary of the paper speaks of tokens at the input, made by an MLP (``reparameterised``).

    Trains: prefix and LoRA in stage 2 (P = 16, r = 8): 589,824 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size, unless all weights train; every layer attends to P more
    keys, in training and at inference.
    Source: Kim et al., Preserving Pre-trained Representation Space, EMNLP Findings 2024.
    """

    Config = PTPEFTConfig
    config: PTPEFTConfig
    groups = ("prefix",)

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Add the prefix. Raises UserError where LoRA's rank is above the width of a projection, before stage 1."""
        if self.config.then == "lora":
            for view in model.views.values():
                check_rank("pt-peft", self.config.rank, view, self.config.targets)
        super().adapt(model, schedule)
        self._schedule = schedule
        for prefix in prefixes(model).values():
            group(prefix, "prefix")

    def stages(self) -> tuple[Stage, ...]:
        """The prefix alone, then both."""
        return Stage("prefix", self.config.share), Stage(self.config.then, 1 - self.config.share)

    def begin_stage(self, state: StepState) -> None:
        """At stage 2, add the second method."""
        if state.stage.name == self.config.then:
            self._add_second(state.model)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """In stage 2: those of the prefix and of the second method."""
        both = super().trainable_parameters(task, views) + self._second.trainable_parameters(task, views)
        return both - fusion_parameters(task)

    def prepare_inference(self, model: Recommender) -> None:
        """Drop the MLPs; merge LoRA."""
        super().prepare_inference(model)
        self._second.prepare_inference(model)

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Load a ``state`` of either stage; what stage 2 adds is added if the state has it."""
        fold(model)
        trains = {name for name, value in model.named_parameters() if value.requires_grad}
        if any(name.startswith("encoders.") for name in state.keys() - trains):
            self._add_second(model)
        super().load_state(model, state)

    @property
    def _second(self) -> Method:
        return SECOND[self.config.then](self.config)

    def _add_second(self, model: Recommender) -> None:
        device = next(model.parameters()).device
        self._second.adapt(model, self._schedule)
        for prefix in prefixes(model).values():
            prefix.requires_grad_(True)  # peft freezes what it does not add
        for part in model.encoders.modules():
            if isinstance(part, Bottleneck):
                nn.init.zeros_(part.up.weight)
        model.to(device)
