"""TPGM (Tian et al., CVPR 2023): full fine-tuning in balls whose radii learn from users that do not train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.task.batches import Batch
from tpme.bench.task.loss import in_batch_loss
from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Context, StepState
from tpme.methods.parts.projection import Balls, ProjectedAdam, ProjectedConfig, ProjectedMethod

FEWEST = 2
"""Users of each part of the split: the loss of one user alone is 0, because other users' items are its negatives."""
SCALE = 2.0**10
"""Of the loss of a projection batch, so that half-precision gradients do not underflow; exact, and divided out."""


class TPGMConfig(ProjectedConfig):
    """projection_users: share of the training users on whom the radii learn, and no weight.

    interval: steps from one update of the radii to the next.
    """

    projection_users: Annotated[float, Field(gt=0, lt=1)] = 0.1
    interval: PositiveInt = 1


class TrainableProjection(ProjectedAdam):
    """Projects in each step; the radii learn when ``learn`` is called."""

    first_radius = torch.inf

    def after_base(self, ball: Balls) -> None:
        """Note the displacement; a first radius is half the least norm of a row."""
        ball.displace()
        first = ball.norm.amin(1, keepdim=True) / 2
        ball.set(radius=ball.bounded(torch.where(ball.radius.isinf(), first, ball.radius)))

    def learn(self, loss: Tensor) -> None:
        """Update the radii by the gradient of a loss at the projected weights, and project with the new ones.

        Tensors whose gradient overflows keep their radii.
        """
        gradients = torch.autograd.grad(loss * SCALE, [tensor for ball in self.balls for tensor in ball.tensors])
        rest = iter(gradients)
        with torch.no_grad():
            for ball in self.balls:
                slopes = ball.slopes([next(rest) for _ in ball.tensors]) / SCALE
                ball.skipped = ~slopes.isfinite().all()
                # Rows within the ball do not depend on its radius.
                ball.learn((slopes * (ball.radius < ball.norm)).sum(1, keepdim=True), self.defaults["radius_lr"])
                ball.project()


class TPGM(ProjectedMethod):
    """Trains every weight of the encoders, each tensor in a ball around its pretrained value whose radius is learnt on
    users kept apart.

    ``W_r <- W0_r + min(1, gamma / n_r) c_r, gamma = argmin L_proj``. c = W - W0 after the step of Adam, ``n_r =
    |c_r|_1 + 1e-8`` for each row r; a bias or the scale of a norm is one row. One gamma a tensor starts at half the
    least n_r of the first step. After each step (or each ``interval`` steps) the loss of a batch of the projection
    users at the projected weights, in eval mode, gives ``dL/dgamma = sum_{r: gamma < n_r} <dL/dW_r, c_r / n_r>``; Adam
    (``radius_lr``) updates the radii, and the weights are projected with them. gamma stays between 1e-8 and the largest
    n_r. The share ``projection_users`` of the training users, drawn by the seed, is the projection split: the radii
    learn on them and all weights on the others, so an epoch has fewer steps. Validation and test targets are in
    neither. As in the released code, with its norm for ResNets; instead of copying the model, the weights
    are projected in place. FLOPs of a step leave out the projection batch.

    Trains: all weights, as full fine-tuning: 108,891,648 in BERT-base, 85,798,656 in ViT-B/16.
    Saves: nothing: a step has a second forward and backward pass, and the optimiser keeps two more copies of the
    weights, anchor and displacement; inference costs the same as frozen encoders.
    Source: Tian et al., Trainable Projected Gradient Method for Robust Fine-Tuning, CVPR 2023.
    """

    Config = TPGMConfig
    config: TPGMConfig
    name: ClassVar[str] = "tpgm"
    projection: TrainableProjection | None

    def __init__(self, config: TPGMConfig) -> None:
        super().__init__(config)
        self._batches: Iterator[Batch] | None = None
        self._held = 0
        self._autocast: dict[str, Any] = {}

    def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """Adam with projection."""
        self.projection = TrainableProjection(groups, radius_lr=self.config.radius_lr, fused=fused)
        return self.projection

    def check_run(self, users: int) -> None:
        """Raise UserError where radii or weights would learn from less than two users."""
        held = self._number(users)
        if min(held, users - held) < FEWEST:
            raise UserError(
                f"method 'tpgm': projection_users = {self.config.projection_users:g} divides the {users} training "
                f"users into {held} for the radii and {users - held} for the weights; each part needs {FEWEST} (one "
                "user alone has no negatives)"
            )

    def run(self, context: Context) -> None:
        """Train on the users that are not in the projection split, then let its batches and the optimiser go."""
        self.check_run(len(context.users))
        held = self.projection_users(context)
        context.train(users=np.setdiff1d(context.users, held))
        self.projection = self._batches = None
        self._held = len(held)

    def report(self, model: Recommender) -> dict[str, float]:
        """As of every projected method, and the users of the projection split."""
        return super().report(model) | {"projection_users": float(self._held)}

    def projection_users(self, context: Context) -> NDArray[np.int64]:
        """The training users of the projection split, the same for a seed."""
        users = np.random.default_rng([context.seed, 1]).permutation(context.users)
        return np.sort(users[: self._number(len(users))])

    def _number(self, users: int) -> int:
        return round(self.config.projection_users * users)

    def begin_pass(self, name: str, model: Recommender) -> None:
        """Note the precision of the step; a projection batch has the same."""
        device = next(model.parameters()).device.type
        if device != "meta":  # where costs are counted
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            self._autocast = {"device_type": device, "dtype": dtype, "enabled": enabled}

    def after_step(self, state: StepState, context: Context) -> None:
        """Update the radii on the next batch of the projection users, and project."""
        if (state.step + 1) % self.config.interval or self.projection is None:
            return
        if self._batches is None:
            self._batches = _endless(context, self.projection_users(context))
        batch = next(self._batches)
        self.projection.zero_grad(set_to_none=True)  # room for the gradients of the projection batch
        state.model.eval()
        with torch.autocast(**self._autocast):
            vectors = self.encode(state.model, batch.items)
            users = state.model.user_vectors(vectors[batch.slot[:, :-1]], batch.mask)
            loss = in_batch_loss(users, vectors, batch.candidates)
        self.projection.learn(loss)
        state.model.train()


def _endless(context: Context, users: NDArray[np.int64]) -> Iterator[Batch]:
    while True:
        yield from context.batches(users)
