"""LoRA (Hu et al., ICLR 2022), through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, PositiveInt

from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape, fusion_parameters


class LoRAConfig(MethodConfig):
    """Rank r, scale alpha / r, dropout of the adapted input, and the adapted projections."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[Role, ...], Field(min_length=1)] = ("query", "value")


class LoRA(Method):
    """``h = W x + (alpha / r) B A x``; A Kaiming-uniform, B zero; W stays the pretrained weight.

    Trainable at BERT-base + ViT-B/16, r = 8 on q and v: 2 x 294,912 of the encoders. Merged for inference.
    """

    Config = LoRAConfig
    config: LoRAConfig

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Wrap the target projections of each encoder in place."""
        from peft import LoraConfig, inject_adapter_in_model

        for view in model.views.values():
            settings = LoraConfig(
                r=self.config.rank,
                lora_alpha=self.config.alpha,
                lora_dropout=self.config.dropout,
                target_modules=view.projections(*self.config.targets),
            )
            inject_adapter_in_model(settings, view.module)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """r (inputs + outputs) of every adapted projection."""
        weights = [
            view.module.get_parameter(f"{name}.weight")
            for view in views.values()
            for name in view.projections(*self.config.targets)
        ]
        return self.config.rank * sum(sum(weight.shape) for weight in weights) + fusion_parameters(task)

    def prepare_inference(self, model: Recommender) -> None:
        """Merge B A into the weights; inference then costs the same as with the frozen encoder."""
        from peft.tuners.lora import LoraLayer

        for module in model.encoders.modules():
            if isinstance(module, LoraLayer):
                module.merge()
