"""Projected fine-tuning: every pretrained tensor stays in a ball around its pretrained value, whose radius is learnt.

``Balls`` is the arithmetic, on all tensors of one shape at a time, because thousands of small kernels would cost more
than what they compute. ``ProjectedAdam`` is the optimiser, ``ProjectedMethod`` the method around it; FTP and TPGM
differ in the gradient that the radii learn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.record import LearningRates, Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, StepState, TaskShape, fusion_parameters

FLOOR = 1e-8
"""Smallest radius; also added to every norm."""
BETAS, EPS = (0.9, 0.999), 1e-8
"""Of the Adam that updates the radii."""
STATE = ("anchor", "direction", "norm", "radius", "radius_mean", "radius_square", "radius_step")
QUANTILES = (0.1, 0.5, 0.9)
"""Of the radii of an encoder's tensors, for the report."""
State = dict[str, Tensor]


def unmoved(tensor: Tensor, radius: float) -> State:
    """The state of a tensor before its first step; R rows, or one row if it is a vector.

    anchor, direction: of the tensor's shape. norm: (R,). radius and its Adam's moments and step: (1,).
    """
    values = (
        tensor.detach(),
        tensor.new_zeros(()).expand_as(tensor),
        tensor.new_zeros(len(tensor) if tensor.ndim > 1 else 1),
        tensor.new_full((1,), radius),
        *(tensor.new_zeros(1) for _ in range(3)),
    )
    return dict(zip(STATE, values, strict=True))


class Balls:
    """G tensors of one shape, each in a ball of its own radius around its anchor W0.

    The displacement of row r by the base optimiser is ``c_r = W_r - W0_r``, its norm ``n_r = |c_r|_1 + 1e-8``, its
    direction ``c_r / n_r``. A row is W[r] with all its further dimensions; a vector is one row.

    Args:
        tensors: the G weights. states: of each; their values become views of what is stacked here, (G, ...).
    """

    def __init__(self, tensors: Sequence[Tensor], states: Sequence[State]) -> None:
        self.tensors = list(tensors)
        self.skipped: Tensor | None = None
        """Whether this step is to be ignored, because a gradient overflowed: a scalar that the host never reads."""
        self._state = {name: torch.stack([state[name] for state in states]) for name in STATE}
        for name, stacked in self._state.items():
            for state, own in zip(states, stacked.unbind(), strict=True):
                state[name] = own

    @property
    def norm(self) -> Tensor:
        """n, (G, R), before the projection."""
        return self._state["norm"]

    @property
    def radius(self) -> Tensor:
        """gamma, (G, 1)."""
        return self._state["radius"]

    def set(self, **values: Tensor) -> None:
        """Overwrite parts of the state, unless the step is skipped."""
        for name, value in values.items():
            own = self._state[name]
            own.copy_(value if self.skipped is None else torch.where(self.skipped, own, value))

    def bounded(self, radius: Tensor) -> Tensor:
        """``radius`` (G, 1) between the floor and the largest norm of a row."""
        return torch.minimum(radius.clamp(min=FLOOR), self.norm.amax(1, keepdim=True))

    def displace(self) -> None:
        """Note where the base optimiser has moved the weights."""
        moved = torch.stack(self.tensors).sub_(self._state["anchor"])
        rows = moved.view(*self.norm.shape, -1)
        norm = torch.linalg.vector_norm(rows, 1, dim=2) + FLOOR
        rows.div_(norm[..., None])
        self.set(direction=moved, norm=norm)

    def project(self) -> None:
        """``W_r <- W0_r + min(gamma, n_r) c_r / n_r``."""
        length = torch.minimum(self.radius, self.norm)[..., None]
        anchor, direction = (self._rows(self._state[name]) for name in ("anchor", "direction"))
        projected = torch.addcmul(anchor, length, direction).view_as(self._state["anchor"])
        torch._foreach_copy_(self.tensors, list(projected.unbind()))

    def slopes(self, gradients: Sequence[Tensor]) -> Tensor:
        """``<dL/dW_r, c_r / n_r>``, (G, R): the slope of the loss L where row r is at its radius."""
        return self._rows(torch.stack(list(gradients)).mul_(self._state["direction"])).sum(2)

    def learn(self, slopes: Tensor, lr: float) -> None:
        """One step of Adam on the radii; slopes: dL/dgamma, (G, 1)."""
        step = self._state["radius_step"] + 1
        mean = self._state["radius_mean"].lerp(slopes, 1 - BETAS[0])
        square = self._state["radius_square"].lerp(slopes.square(), 1 - BETAS[1])
        # 1 - beta^t without cancellation
        first, second = (-torch.expm1(step * math.log(beta)) for beta in BETAS)
        radius = self.radius - lr * (mean / first) / ((square / second).sqrt() + EPS)
        self.set(radius_step=step, radius_mean=mean, radius_square=square, radius=self.bounded(radius))

    def _rows(self, stacked: Tensor) -> Tensor:
        """(G, ...) as (G, R, entries of a row)."""
        return stacked.view(*self.norm.shape, -1)


class ProjectedAdam(torch.optim.AdamW):
    """AdamW whose projected groups stay in balls around the values that they had before their first step.

    All that it keeps is in ``state``, by parameter: Adam's moments and step; anchor, direction and norm of the last
    displacement; the radius, its moments and its step. So a state dict, loaded in the middle of a run, continues it.
    Under a ``GradScaler``, a skipped step leaves weights and state as they were, without the host waiting for it.

    Args:
        groups: as of every optimiser; those with ``projected`` = True are projected.
        radius_lr: learning rate of the radii. fused: as of AdamW.
    """

    first_radius = FLOOR
    balls: Sequence[Balls] = ()

    def __init__(self, groups: Sequence[dict[str, Any]], *, radius_lr: float, fused: bool) -> None:
        super().__init__(groups, weight_decay=0.0, fused=fused)
        self.defaults["radius_lr"] = radius_lr  # attributes do not survive a copy of an optimiser, defaults do

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """The base update; then radii and projection."""
        balls, fresh = self._balls_of_step()
        super().step()
        for tensor, state in fresh.items():  # now, because Adam takes a state that is not empty for its own
            self.state[tensor].update(state)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for ball in balls:
            ball.skipped = None if found_inf is None else found_inf > 0
            self.after_base(ball)
            ball.project()

    def after_base(self, ball: Balls) -> None:
        """Note what the base update did to these tensors and set their radii."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, whose tensors are then stacked anew."""
        self.balls = ()
        super().load_state_dict(state_dict)

    def moving(self) -> list[Tensor]:
        """The projected tensors that have a gradient."""
        groups = (group["params"] for group in self.param_groups if group["projected"])
        return [tensor for tensors in groups for tensor in tensors if tensor.grad is not None]

    def _balls_of_step(self) -> tuple[Sequence[Balls], dict[Tensor, State]]:
        """The moving tensors by shape, stacked anew if they are not those of the last step; states of new ones."""
        moving, fresh = self.moving(), {}
        if {*map(id, moving)} != {id(tensor) for ball in self.balls for tensor in ball.tensors}:
            fresh = {
                tensor: unmoved(tensor, self.first_radius)
                for tensor in moving
                if "anchor" not in self.state.get(tensor, {})
            }
            alike: dict[Any, list[Tensor]] = {}
            for tensor in moving:
                alike.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(tensor)
            self.balls = [Balls(own, [fresh.get(t) or self.state[t] for t in own]) for own in alike.values()]
        return self.balls, fresh

    @torch.no_grad()
    def measures(self) -> dict[str, Tensor]:
        """By projected group, not read: distance ``||W - W0|| / ||W0||``, radii, share of the rows at their radius."""
        found: dict[str, Tensor] = {}
        for group in self.param_groups:
            states = [self.state[tensor] for tensor in group["params"] if "anchor" in self.state.get(tensor, {})]
            if states:
                anchor, direction, norm, radius = ([s[key] for s in states] for key in STATE[:4])
                lengths = [torch.minimum(n, r) for n, r in zip(norm, radius, strict=True)]
                sizes = [
                    torch.linalg.vector_norm(u.view(len(n), -1), dim=1) for u, n in zip(direction, norm, strict=True)
                ]
                moved = torch.stack([(n * u).norm() for n, u in zip(lengths, sizes, strict=True)]).norm()
                quantiles = torch.quantile(torch.cat(radius), torch.tensor(QUANTILES, device=radius[0].device))
                bound = torch.cat([n > r for n, r in zip(norm, radius, strict=True)])
                measured = {"distance": moved / torch.stack(torch._foreach_norm(anchor)).norm()}
                measured |= {f"radius_p{100 * q:.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
                measured["rows_at_radius"] = bound.float().mean()
                found |= {f"{group['name']}_{key}": value for key, value in measured.items()}
        return found


class ProjectedConfig(MethodConfig):
    """radius_lr: learning rate of the radii. last: how many layers, from the last one, train; by default everything."""

    radius_lr: PositiveFloat = 1e-2
    last: PositiveInt | None = None


class ProjectedMethod(Method):
    """Full fine-tuning of the encoders under a ``ProjectedAdam``."""

    Config = ProjectedConfig
    config: ProjectedConfig
    name: ClassVar[str]

    def __init__(self, config: ProjectedConfig) -> None:
        super().__init__(config)
        self.projection: ProjectedAdam | None = None
        """The optimiser of the training; let go after it, because it holds the anchors."""
        self._measured: dict[int, dict[str, Tensor]] = {}
        """What the optimiser measures, after every epoch."""

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Let what is projected train. Raises UserError for more layers than an encoder has."""
        for view in model.views.values():
            for parameter in self._parameters(view):
                parameter.requires_grad_(True)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """The size of the encoders, or of their last layers and final norms."""
        encoders = sum(value.numel() for view in views.values() for value in self._parameters(view))
        return encoders + fusion_parameters(task)

    def param_groups(self, model: Recommender, lr: LearningRates) -> list[dict[str, Any]]:
        """The default groups with the names of their tensors; those of the encoders are projected."""
        names = {value: name for name, value in model.named_parameters()}
        return [
            group | {"param_names": [names[p] for p in group["params"]], "projected": group["name"] in model.encoders}
            for group in super().param_groups(model, lr)
        ]

    def on_epoch_end(self, state: StepState) -> None:
        """Measure how far the encoders are from their anchors, without waiting for the device."""
        if self.projection is not None:
            self._measured[state.epoch] = self.projection.measures()

    def report(self, model: Recommender) -> dict[str, float]:
        """Of each encoder after the last epoch: relative distance from the anchor, radii, share of rows at theirs.

        And the distance after every epoch.
        """
        measured = self._measured
        last = measured[max(measured)] if measured else {}
        by_epoch = {
            f"{name}_epoch_{epoch}": values[name]
            for epoch, values in measured.items()
            for name in values
            if name.endswith("_distance")
        }
        return {name: float(value) for name, value in (last | by_epoch).items()}

    def _parameters(self, view: EncoderView) -> Iterator[nn.Parameter]:
        """What trains of an encoder."""
        last, layers = self.config.last, view.layers
        if last is None:
            return view.module.parameters()
        if last > len(layers):
            raise UserError(
                f"method '{self.name}': last = {last}, but {type(view.module).__name__} ({view.modality} encoder) has "
                f"{len(layers)} layers; choose fewer"
            )
        parts = [*layers[-last:], *([view.final_norm] if view.final_norm is not None else [])]
        return nn.ModuleList(parts).parameters()
