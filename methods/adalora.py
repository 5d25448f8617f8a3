"""AdaLoRA (Zhang et al., ICLR 2023): LoRA whose ranks are allocated to the projections by importance.

The layers are peft's. The allocation does what peft's ``RankAllocator`` does, which reads its threshold and every mask
back to the host in each step and handles the layers one by one; here nothing waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Context, MethodConfig, PassOutput, Schedule, StepState, TaskShape, fusion_parameters
from tpme.methods.parts.low_rank import adapted_weights, check_rank
from tpme.methods.parts.peft_injection import ADAPTER, PeftMethod

Share = Annotated[float, Field(ge=0, lt=1)]


class AdaLoRAConfig(MethodConfig):
    """Ranks, scale, orthogonality, schedule of the pruning, and the adapted projections.

    rank, target_rank: of every projection at the start, and on average at the end. alpha: the scale is alpha / rank.
    orthogonality: weight of its loss. warmup, final: shares of all steps before and after the pruning, with constant
    ranks. interval: steps from one pruning to the next. smoothing: of sensitivity and uncertainty.
    """

    rank: PositiveInt = 12
    target_rank: PositiveInt = 8
    alpha: PositiveInt = 8
    orthogonality: NonNegativeFloat = 0.5
    warmup: Share = 0.1
    final: Share = 0.5
    interval: PositiveInt = 1
    smoothing: Share = 0.85
    dropout: Share = 0.0
    targets: Annotated[tuple[Role, ...], Field(min_length=1)] = ("query", "value")

    @model_validator(mode="after")
    def _fits(self) -> AdaLoRAConfig:
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank {self.target_rank} is above rank {self.rank}, at which pruning starts")
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final together leave no step to prune in; their sum must be below 1")
        return self

    def last_pruning(self, steps: int) -> int:
        """The step, from 1, that prunes to ``target_rank``."""
        return steps - int(self.final * steps)

    def budget(self, step: int, steps: int, layers: int) -> int:
        """How many triplets an encoder with ``layers`` adapted projections keeps after ``step`` (from 1) of ``steps``.

        Constant, then cubic from ``rank`` to ``target_rank``, then constant.
        """
        first, last = int(self.warmup * steps), self.last_pruning(steps)
        left = 1 - min(max(step - first, 0) / max(last - first, 1), 1)
        return int((self.rank - self.target_rank) * layers * left**3) + self.target_rank * layers


class Triplets:
    """The triplets ``B_i E_i A_i`` of n projections of one shape, and how important they are."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []

    def factors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """A (r, in), B (out, r) and E (r, 1) of every projection."""
        a, b, e = ([getattr(layer, f"lora_{name}")[ADAPTER] for layer in self.layers] for name in "ABE")
        return a, b, e

    @torch.no_grad()
    def observe(self, smoothing: float) -> None:
        """Update sensitivity, the mean of ``|p dL/dp|``, and uncertainty, its mean deviation."""
        for i, part in enumerate(self.factors()):
            gradients = [parameter.grad for parameter in part if parameter.grad is not None]
            importance = torch.stack(part).mul_(torch.stack(gradients)).abs_()
            if i == len(self.sensitivity):  # on the first step, when the model is on its device
                self.sensitivity.append(torch.zeros_like(importance))
                self.uncertainty.append(torch.zeros_like(importance))
            self.sensitivity[i].lerp_(importance, 1 - smoothing)
            self.uncertainty[i].lerp_((importance - self.sensitivity[i]).abs_(), 1 - smoothing)

    def scores(self) -> Tensor:
        """(n, r): the importance of E, and the means of those of a row of A and a column of B."""
        a, b, e = (s * u for s, u in zip(self.sensitivity, self.uncertainty, strict=True))
        return e[..., 0] + a.mean(2) + b.mean(1)

    def values(self) -> Tensor:
        """(n, r): E of every projection."""
        return torch.stack(self.factors()[2])[..., 0].detach()

    def orthogonality(self) -> Tensor:
        """(2n,): ``||A A^T - I||`` and ``||B^T B - I||``, Frobenius norms."""
        a, b = (torch.stack(part) for part in self.factors()[:2])
        identity = torch.eye(a.shape[1], device=a.device)
        return torch.cat([torch.linalg.matrix_norm(rows @ rows.mT - identity) for rows in (a, b.mT)])


class RankBudget:
    """Allocates the ranks of one encoder among its adapted projections; steps count from 1."""

    def __init__(self, layers: Iterable[Any], config: AdaLoRAConfig) -> None:
        shapes = defaultdict(list)
        for layer in layers:
            shapes[tuple(layer.base_layer.weight.shape)].append(layer)
        self.config, self.groups = config, [Triplets(group) for group in shapes.values()]
        self.layers = sum(map(len, shapes.values()))
        self.kept: list[Tensor] | None = None
        """The triplets that are left, (projections, r) of every group; ``None`` while that may still change."""

    @property
    def _known(self) -> bool:
        """Whether the triplets to keep, or their importances, are known."""
        return self.kept is not None or bool(self.groups[0].sensitivity)

    def update(self, step: int, steps: int) -> None:
        """Observe this step's gradients, and prune where the schedule says so."""
        if step < self.config.last_pruning(steps) or not self._known:
            for group in self.groups:
                group.observe(self.config.smoothing)
            self.kept = None
            if step > self.config.warmup * steps and step % self.config.interval == 0:
                self._mask(self._chosen(step, steps))
        else:
            self.finish(step, steps)

    def finish(self, step: int, steps: int) -> None:
        """Prune to the target at the first call; keep the same triplets from then on. All, if no step was observed."""
        if self._known:
            self.kept = self.kept or self._chosen(step, steps)
            self._mask(self.kept)

    def remember(self) -> None:
        """Keep the ranks of a loaded state until importances are known."""
        self.kept = [group.values() != 0 for group in self.groups]

    def ranks(self) -> Tensor:
        """The triplets that are not zero, on average over the projections."""
        return torch.cat([group.values().count_nonzero(1) for group in self.groups]).float().mean()

    def _chosen(self, step: int, steps: int) -> list[Tensor]:
        """The most important triplets, as many as the budget, over all projections of the encoder."""
        scores = [group.scores() for group in self.groups]
        excess = self.layers * self.config.rank - self.config.budget(step, steps, self.layers)
        if not excess:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        threshold = torch.cat([score.flatten() for score in scores]).kthvalue(excess).values
        return [score > threshold for score in scores]

    @torch.no_grad()
    def _mask(self, kept: Sequence[Tensor]) -> None:
        """Set E of the other triplets to zero."""
        for group, rows in zip(self.groups, kept, strict=True):
            for e, row in zip(group.factors()[2], rows, strict=True):
                e.mul_(row[:, None])


class AdaLoRA(PeftMethod):
    """Trains low-rank updates in SVD form, and prunes the least important ranks of all layers to a budget.

    ``y = W x + (alpha / r) B E A x``, E diagonal; A (r, in) and B (out, r) start at N(0, 0.02), E (r,) at zero. A loss
    term for each encoder, ``orthogonality * mean(||A A^T - I||_F, ||B^T B - I||_F)``, keeps A and B nearly orthogonal.
    A triplet is one entry of E with its row of A and column of B; its importance is the sum of theirs, means over the
    row and the column. That of a parameter p is sensitivity times uncertainty: the moving averages of ``|p dL/dp|`` and
    of its deviation. After every step the triplets beyond the budget get E = 0. The budget falls cubically from
    ``rank`` to ``target_rank`` between the shares ``warmup`` and ``final`` of all steps. Pruned triplets stay
    allocated, and may return while the budget falls. Section 3; as in the released code and in peft, the norms are
    not squared. The shares are about those of the released scripts (MNLI 0.09 and 0.58, RTE 0.15 and 0.46).

    Trains: A, B and E of queries and values (r = 12): 442,656 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size, in which pruned ranks still count; a step also updates
    importances; inference costs the same as frozen encoders, because B E A is merged into W.
    Source: Zhang et al., AdaLoRA, ICLR 2023.
    """

    Config = AdaLoRAConfig
    config: AdaLoRAConfig
    name: ClassVar[str] = "adalora"

    def __init__(self, config: AdaLoRAConfig) -> None:
        super().__init__(config)
        self.budgets: dict[Modality, RankBudget] = {}

    def settings(self, view: EncoderView) -> Any:
        """Wrap the target projections. Raises UserError for a rank above the width of one."""
        from peft import AdaLoraConfig

        check_rank(self.name, self.config.rank, view, self.config.targets)
        return AdaLoraConfig(
            init_r=self.config.rank,
            target_r=self.config.target_rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            total_step=1,  # of peft's own allocator, which is not used
            target_modules=view.projections(*self.config.targets),
        )

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Inject the adapters, and begin with full ranks."""
        super().adapt(model, schedule)
        for modality, view in model.views.items():
            names = view.projections(*self.config.targets)
            self.budgets[modality] = RankBudget(map(view.module.get_submodule, names), self.config)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """r (inputs + outputs + 1) of every adapted projection; pruned triplets stay allocated."""
        weights = adapted_weights(views.values(), self.config.targets)
        return self.config.rank * sum(sum(weight.shape) + 1 for weight in weights) + fusion_parameters(task)

    def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
        """The task's loss, and the orthogonality of each encoder."""
        parts = [torch.cat([group.orthogonality() for group in b.groups]).mean() for b in self.budgets.values()]
        return super().losses(outputs) | {"orthogonality": self.config.orthogonality * torch.stack(parts).sum()}

    def after_backward(self, state: StepState) -> None:
        """Empty: where this hook is defined, gradients are unscaled, which importances need."""

    def after_step(self, state: StepState, context: Context) -> None:
        """Update importances and ranks of each encoder; gradients are still there, and skipped steps do not count."""
        for budget in self.budgets.values():
            budget.update(state.step + 1, state.schedule.total_steps)

    def on_epoch_end(self, state: StepState) -> None:
        """Finish the allocation if the step that should have done so was skipped."""
        steps = state.schedule.total_steps
        if state.step >= self.config.last_pruning(steps):
            for budget in self.budgets.values():
                budget.finish(state.step, steps)

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Load a state, whose zeros in E are the pruned ranks."""
        super().load_state(model, state)
        for budget in self.budgets.values():
            budget.remember()

    def report(self, model: Recommender) -> dict[str, float]:
        """Ranks on average over the projections: allocated, and not zero in each encoder."""
        ranks = {f"{modality}_rank": float(budget.ranks()) for modality, budget in self.budgets.items()}
        return {"allocated_rank": float(self.config.rank)} | ranks
