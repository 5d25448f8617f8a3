"""VeRA (Kopiczko et al., ICLR 2024): trained scales of a random low-rank update, through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.view import EncoderView
from tpme.methods.base import MethodConfig, TaskShape, fusion_parameters
from tpme.methods.parts.low_rank import adapted_weights
from tpme.methods.parts.peft_injection import PeftMethod


class VeRAConfig(MethodConfig):
    """Rank r, initial value of d, seed of the random matrices, dropout, and the adapted projections."""

    rank: PositiveInt = 256
    scale: PositiveFloat = 0.1
    matrices_seed: NonNegativeInt = 0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[Role, ...], Field(min_length=1)] = ("query", "value")


class VeRA(PeftMethod):
    """Trains two scaling vectors of a random low-rank update whose matrices all projections of an encoder share.

    ``y = W x + b * (B (d * (A x)))`` (equation 2); A (r, in) and B (out, r) are random and frozen, as large as the
    largest projection needs, and sliced for the others; b (out,) starts at zero, d (r,) at ``scale``. A and B are made
    from ``matrices_seed``, the same for every cell, and are not stored. As they do not train, r may exceed the width.
    The learning rate is typically ten times LoRA's.

    Trains: b and d of queries and values (r = 256): 24,576 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size, a twelfth of LoRA's; a step costs a tenth more FLOPs than
    LoRA's, because A and B are wide; inference costs the same as frozen encoders, because the update is merged into W.
    Source: Kopiczko et al., VeRA, ICLR 2024.
    """

    Config = VeRAConfig
    config: VeRAConfig
    name: ClassVar[str] = "vera"

    def settings(self, view: EncoderView) -> Any:
        """Wrap the target projections of one encoder, which share A and B."""
        from peft import VeraConfig

        return VeraConfig(
            r=self.config.rank,
            d_initial=self.config.scale,
            projection_prng_key=self.config.matrices_seed,
            vera_dropout=self.config.dropout,
            target_modules=view.projections(*self.config.targets),
        )

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """A scale for every output of an adapted projection, and r for the rank."""
        weights = adapted_weights(views.values(), self.config.targets)
        return sum(len(weight) + self.config.rank for weight in weights) + fusion_parameters(task)
