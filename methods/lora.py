"""LoRA (Hu et al., ICLR 2022): a trained low-rank update of frozen projections, through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.view import EncoderView
from tpme.methods.base import MethodConfig, TaskShape, fusion_parameters
from tpme.methods.parts.low_rank import adapted_weights, check_rank
from tpme.methods.parts.peft_injection import PeftMethod


class LoRAConfig(MethodConfig):
    """Rank r, scale alpha / r, dropout of the adapted input, and the adapted projections."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[Role, ...], Field(min_length=1)] = ("query", "value")


class LoRA(PeftMethod):
    """Adds a trained product of two thin matrices to frozen projections.

    ``y = W x + (alpha / r) B A x`` (equation 3); A (r, in) starts Kaiming-uniform, B (out, r) at zero.

    Trains: A and B of queries and values (r = 8): 294,912 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; inference costs the same as frozen encoders, because B A
    is merged into W.
    Source: Hu et al., LoRA, ICLR 2022.
    """

    Config = LoRAConfig
    config: LoRAConfig
    name: ClassVar[str] = "lora"
    decomposed: ClassVar[bool] = False
    """Weights are decomposed into direction and magnitude (DoRA)."""

    def settings(self, view: EncoderView) -> Any:
        """Wrap the target projections. Raises UserError for a rank above the width of one."""
        from peft import LoraConfig

        check_rank(self.name, self.config.rank, view, self.config.targets)
        return LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            use_dora=self.decomposed,
            target_modules=view.projections(*self.config.targets),
        )

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """r (inputs + outputs) of every adapted projection."""
        weights = adapted_weights(views.values(), self.config.targets)
        return self.config.rank * sum(sum(weight.shape) for weight in weights) + fusion_parameters(task)
