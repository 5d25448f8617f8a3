"""FTP (Tian et al., NeurIPS 2023): full fine-tuning in balls whose radii learn from the gradients of the training."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from tpme.methods.base import Context
from tpme.methods.parts.projection import Balls, ProjectedAdam, ProjectedConfig, ProjectedMethod


class FTPConfig(ProjectedConfig):
    """annealing: k, the factor of slopes that shrink a radius; 1 shrinks most, with 0 radii only grow."""

    annealing: Annotated[float, Field(ge=0, le=1)] = 1.0


class FastProjection(ProjectedAdam):
    """Learns the radii from the gradient of the step and the displacement of the step before.

    Args:
        groups, radius_lr, fused: as of ``ProjectedAdam``. annealing: k.
    """

    def __init__(self, groups: list[dict[str, Any]], *, radius_lr: float, annealing: float, fused: bool) -> None:
        super().__init__(groups, radius_lr=radius_lr, fused=fused)
        self.defaults["annealing"] = annealing

    def after_base(self, ball: Balls) -> None:
        """Learn from the slope along the last displacement, then note the new one."""
        # A GradScaler's gradients are unscaled here: fused Adam divides them in place, any other gets them so.
        slopes = ball.slopes([tensor.grad for tensor in ball.tensors if tensor.grad is not None]).sum(1, keepdim=True)
        ball.displace()
        ball.learn(torch.where(slopes > 0, self.defaults["annealing"] * slopes, slopes), self.defaults["radius_lr"])


class FTP(ProjectedMethod):
    """Trains every weight of the encoders, each tensor in a ball around its pretrained value whose radius is learnt
    from the training gradient.

    ``W_r <- W0_r + min(1, gamma / n_r) c_r``. c = W - W0 after the step of Adam, ``n_r = |c_r|_1 + 1e-8`` for each row
    r; a bias or the scale of a norm is one row. One gamma a tensor, 1e-8 at first, is updated in each step by Adam
    (``radius_lr``) with the gradient ``g = sum_r <dL/dW_r, c'_r / n'_r>``, c' the displacement of the step before,
    unprojected; g > 0, which shrinks the ball, is multiplied by k (``annealing``). gamma stays between 1e-8 and the
    largest n_r. Algorithm 1, as in the released optimiser; the state is kept by tensor, so a tensor without a gradient
    does not shift that of others. A radius grows by at most about ``radius_lr`` a step, whatever the learning rate, so
    short trainings stay near the pretrained weights. ``last`` = n trains the last n layers and the final norm alone.
    The recommender trains by Adam without projection.

    Trains: all weights, as full fine-tuning: 108,891,648 in BERT-base, 85,798,656 in ViT-B/16.
    Saves: nothing: beside what full fine-tuning needs, the optimiser keeps two copies of the weights, anchor and last
    displacement, and passes over them in each step; inference costs the same as frozen encoders.
    Source: Tian et al., Fast Trainable Projection for Robust Fine-Tuning, NeurIPS 2023.
    """

    Config = FTPConfig
    config: FTPConfig
    name: ClassVar[str] = "ftp"

    def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """Adam with projection."""
        config = self.config
        self.projection = FastProjection(groups, radius_lr=config.radius_lr, annealing=config.annealing, fused=fused)
        return self.projection

    def run(self, context: Context) -> None:
        """Train, then let the optimiser go."""
        context.train()
        self.projection = None
