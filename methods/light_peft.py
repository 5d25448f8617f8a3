"""Light-PEFT (Gu et al., ACL Findings 2024): encoder and low-rank updates are pruned once, before the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator
from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import (
    Context,
    Method,
    MethodConfig,
    PassOutput,
    Result,
    Schedule,
    StepState,
    TaskShape,
    fusion_parameters,
)
from tpme.methods.parts.cutting import Structure, cut, parts
from tpme.methods.parts.low_rank import check_rank
from tpme.methods.parts.scored_low_rank import MaskedInput, ScoredLowRank
from tpme.methods.parts.token_mask import TokenMask

SIX: tuple[Role, ...] = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
Share = Annotated[float, Field(ge=0, lt=1)]
_RECORD = "light_peft"
"""The module of a cut encoder that holds its structure."""
_SCORES = "importance of {} updates"
"""In the result of the estimation, beside the state: by modality."""


class LightPEFTConfig(MethodConfig):
    """The low-rank updates, the estimation, and the shares that are cut in each encoder.

    estimation: share of the training's epochs, at least one; it comes on top of them. sparsity: weight of the masks'
    L1 norm. heads, units, modules: shares that are cut of the attention heads of every layer, of all feed-forward
    units, and of all updates. ranks: of those of the updates that are left. unit_scope: units of all layers compete, or
    those of each layer. round_units_to: every layer's units are rounded to a multiple of it; matrix products of odd
    widths take longer, on a CPU as on tensor cores. The published cut is that of 1.
    """

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Share = 0.05
    targets: Annotated[tuple[Role, ...], Field(min_length=1)] = SIX
    estimation: Annotated[float, Field(gt=0, le=1)] = 0.05
    sparsity: NonNegativeFloat = 1e-4
    heads: Share = 1 / 3
    units: Share = 1 / 3
    modules: Share = 0.75
    ranks: Share = 0.5
    unit_scope: Literal["global", "layerwise"] = "global"
    round_units_to: Literal[1, 8, 64] = 8

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Role, ...]) -> tuple[Role, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("name every projection once")
        return targets

    def unit_counts(self, scores: Tensor) -> list[int]:
        """How many units each of L layers keeps, by their scores (L, F); at least one, or ``round_units_to``."""
        depth, width = scores.shape
        if self.unit_scope == "global":
            counts = top(scores.flatten(), left(depth * width, self.units)).view(depth, width).sum(1).tolist()
        else:
            counts = [left(width, self.units)] * depth
        whole = self.round_units_to
        return [min(width, max(whole, round(count / whole) * whole)) for count in counts]

    def structure(self, heads: Tensor, units: Tensor, importance: Tensor) -> Structure:
        """Choose what is kept of an encoder.

        Args:
            heads: (L, G) and units: (L, F), values of the masks. importance: (L, roles, 1 + r), of every update and of
                its ranks.
        """
        scores, ranks = importance[..., 0], importance[..., 1:]
        modules = top(scores.flatten(), left(scores.numel(), self.modules)).view_as(scores)
        allowed = ranks.masked_fill(~modules[..., None], -torch.inf)
        count = left(int(modules.sum()) * ranks.shape[-1], self.ranks)
        return Structure(
            heads=torch.stack([top(row, left(len(row), self.heads)) for row in heads]),
            units=torch.stack([top(row, n) for row, n in zip(units, self.unit_counts(units), strict=True)]),
            ranks=top(allowed.flatten(), count).view_as(ranks),
        )


class LightPEFT(Method):
    """Cuts the least useful heads, feed-forward units and low-rank updates out of the encoders, and trains the rest.

    ``y = W[rows, cols] x + (alpha / r) B[rows, ranks] A[ranks, cols] x``. Estimation: LoRA trains at six projections
    of every layer, together with a factor m for every head and every unit, all 1 at the start, on the task's loss plus
    ``sparsity * sum |m|``. In the second half of its steps, two importances are summed: of an update the mean over
    tokens of ``|s B A x| / |W x + b|``, s = alpha / r, and of its rank j ``|mean(A_j dA_j)| + |mean(B_j dB_j)|``. Then
    each encoder is cut once: heads and units with the lowest m, whole updates, and ranks of those left. The factors are
    dropped and not folded into weights; s stays. Training goes on from the estimated updates with a new optimiser.
    Heads that share keys and values are cut together. A layer keeps at least a head and a unit; of equal scores the
    earlier stays. ``tpme plan`` knows no scores, and takes the same share out of every layer.

    Rank, alpha, dropout, sparsity and shares are the released script's; its learning rate is 3e-4, and what suits LoRA
    at two projections with alpha = r may be too high. A share is the most that is cut: of two heads a third is none.
    The script estimates for 800 steps, about 4 % of its epochs; here it is 5 %, at least one epoch. Reconstruction:
    units are rounded to multiples of 8; gated encoders lose the rows of a unit in both projections, and the gate has no
    update unless ``targets`` names it.

    Trains: what is left of A and B (r = 8): 129,024 each in BERT-base and ViT-B/16 when cut evenly.
    Saves: weight gradients, optimiser state and stored size, to which the structure adds a byte for every head, unit
    and rank; a step after the cut costs less than LoRA's in FLOPs, activations and weights, and inference less than
    that of frozen encoders, because B A is merged into W. A step of the estimation costs more than LoRA's.
    Source: Gu et al., Light-PEFT, ACL Findings 2024.
    """

    Config = LightPEFTConfig
    config: LightPEFTConfig

    def __init__(self, config: LightPEFTConfig) -> None:
        super().__init__(config)
        self._estimating = False
        self._first_step = 0
        """Of the estimation."""
        self._updates: list[ScoredLowRank] = []
        self._masks: list[MaskedInput] = []
        """What is estimated, while it is."""

    # --- structure ----------------------------------------------------------------------------------------------

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Add updates and masks. Raises UserError for a rank above the width of a projection."""
        config = self.config
        for view in model.views.values():
            check_rank("light-peft", config.rank, view, config.targets)
            heads, units, tokens = view.heads, view.ffn_width, TokenMask.of(view)
            for name, linear in parts(view, config.targets):
                update = ScoredLowRank(linear, config.rank, config.alpha / config.rank, config.dropout, tokens)
                view.module.set_submodule(name, update)
            group = heads.number // heads.key_value * heads.width
            for name, part in parts(view, ("attention_output",)):
                view.module.set_submodule(name, MaskedInput(part, heads.key_value, group))
            for name, part in parts(view, ("ffn_out",)):
                view.module.set_submodule(name, MaskedInput(part, units, 1))

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """k (inputs + outputs) of every update that is left with k ranks, if all scores were equal."""
        return fusion_parameters(task) + sum(map(self._kept_parameters, views.values()))

    def _kept_parameters(self, view: EncoderView) -> int:
        config, heads, depth = self.config, view.heads, view.shape.depth
        keys = left(heads.key_value, config.heads) * heads.width
        queries = keys * (heads.number // heads.key_value)
        attention = {"query": queries, "key": keys, "value": keys, "attention_output": queries}
        units = config.unit_counts(_falling(depth, view.ffn_width))
        updates = left(depth * len(config.targets), config.modules)
        ranks, more = divmod(left(updates * config.rank, config.ranks), updates)
        total = 0
        for number in range(updates):
            layer, place = divmod(number, len(config.targets))
            side = attention.get(config.targets[place], units[layer])
            total += (ranks + (number < more)) * (view.shape.width + side)
        return total

    # --- estimation ---------------------------------------------------------------------------------------------

    def run(self, context: Context) -> None:
        """Estimate, cut, and train what is left."""
        found = dict(context.once("estimate", "masks and scores", partial(self._estimate, context)))
        model = context.state.model
        with context.phase("estimate", "cut"):
            importance = {modality: found.pop(_SCORES.format(modality)) for modality in model.views}
            self.load_state(model, found)
            for modality, view in model.views.items():
                heads, units = _masks(view)
                kept = self.config.structure(_values(heads), _values(units), importance[modality])
                self._cut(view, kept)
        context.train()

    def _estimate(self, context: Context) -> Result:
        """Train updates and masks; returns the state, and the importance (L, roles, 1 + r) of the updates."""
        epochs = max(1, round(self.config.estimation * context.state.schedule.epochs))
        self._estimating = True
        context.train(epochs, kind="estimate")
        self._estimating, self._updates, self._masks = False, [], []
        model, scores = context.state.model, {}
        for modality, view in model.views.items():
            found = torch.stack([update.importance() for update in self._updates_of(view)])
            scores[_SCORES.format(modality)] = found.view(view.shape.depth, len(self.config.targets), -1)
        return self.state(model) | scores

    def begin_stage(self, state: StepState) -> None:
        """Begin the estimation. Training without one, as in a plan, begins with a cut as if all scores were equal."""
        views = state.model.views.values()
        if self._estimating:
            self._first_step = state.step
            self._updates = [update for view in views for update in self._updates_of(view)]
            self._masks = [part for view in views for of in _masks(view) for part in of]
            return
        for view in views:
            heads, units = _masks(view)
            if heads:
                depth, roles, rank = len(heads), len(self.config.targets), self.config.rank
                importance = _falling(depth * roles, 1 + rank).view(depth, roles, -1)
                equal = _falling(depth, len(heads[0].mask)), _falling(depth, len(units[0].mask))
                self._cut(view, self.config.structure(*equal, importance))

    def before_step(self, state: StepState) -> None:
        """Score the updates in the second half of the estimation."""
        late = 2 * (state.step - self._first_step + 1) > state.schedule.total_steps
        for update in self._updates:
            update.scored = late

    def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
        """The task's loss; in the estimation also the L1 norm of the masks."""
        terms = super().losses(outputs)
        if self._masks:
            norms = torch.stack([part.mask.abs().sum() for part in self._masks])
            terms["masks"] = self.config.sparsity * norms.sum()
        return terms

    def after_backward(self, state: StepState) -> None:
        """Add this step's importance of every update that is scored."""
        for update in self._updates:
            if update.scored:
                update.observe()

    def _updates_of(self, view: EncoderView) -> list[ScoredLowRank]:
        """The updates of an encoder that is not cut, by layer, then by role."""
        found = (part for _, part in parts(view, self.config.targets))
        return [part.inner if isinstance(part, MaskedInput) else part for part in found]

    # --- result -------------------------------------------------------------------------------------------------

    def _cut(self, view: EncoderView, kept: Structure) -> None:
        """Cut an encoder, and let it hold its structure."""
        cut(view, kept, self.config.targets)
        record, device = nn.Module(), next(view.module.parameters()).device
        for part in fields(kept):
            record.register_buffer(part.name, getattr(kept, part.name).to(device))
        view.module.add_module(_RECORD, record)

    def prepare_inference(self, model: Recommender) -> None:
        """Merge the updates into the weights."""
        for part in model.encoders.modules():
            if isinstance(part, ScoredLowRank):
                part.merge()

    def state(self, model: Recommender) -> dict[str, Tensor]:
        """The parameters that train, and the structure of each encoder that is cut."""
        return super().state(model) | _structures(model)

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Load a ``state``; a fresh model is cut to its structure first.

        Raises:
            KeyError, ValueError: as for any method; also where the model is cut to another structure.
        """
        parameters = dict(state)
        for modality, view in model.views.items():
            names = {part.name: f"encoders.{modality}.{_RECORD}.{part.name}" for part in fields(Structure)}
            given = {part: parameters.pop(name).cpu() for part, name in names.items() if name in state}
            if given and _masks(view)[0]:
                self._cut(view, self._checked(view, given))
        super().load_state(model, parameters)
        for name, own in _structures(model).items():
            if name not in state or not torch.equal(own.cpu(), state[name].cpu()):
                raise ValueError(f"state of another structure: '{name}' differs")

    def _checked(self, view: EncoderView, given: Mapping[str, Tensor]) -> Structure:
        """The structure in a state. Raises KeyError and ValueError where it does not fit the encoder."""
        (heads, units), roles = _masks(view), len(self.config.targets)
        depth = len(heads)
        shapes = {
            "heads": (depth, len(heads[0].mask)),
            "units": (depth, len(units[0].mask)),
            "ranks": (depth, roles, self.config.rank),
        }
        for part, shape in shapes.items():
            if part not in given:
                raise KeyError(f"state of another structure: it lacks the {part} of the {view.modality} encoder")
            if given[part].shape != shape:
                raise ValueError(f"state of another structure: {part} are {tuple(given[part].shape)}, here {shape}")
        return Structure(**given)

    def report(self, model: Recommender) -> dict[str, float]:
        """How many heads, feed-forward units, updates and ranks of updates are left of each encoder that is cut."""
        counts = {}
        for name, kept in _structures(model).items():
            _, modality, _, part = name.split(".")
            counts[f"{modality}_{part}_kept"] = float(kept.sum())
            if part == "ranks":
                counts[f"{modality}_modules_kept"] = float(kept.any(2).sum())
        return counts


def left(count: int, share: float) -> int:
    """How many of ``count`` are left when at most ``share`` of them is cut; at least one."""
    return max(1, count - int(share * count + 1e-9))


def top(scores: Tensor, count: int) -> Tensor:
    """(n,) bool: the ``count`` highest of scores (n,), of equal ones the earlier."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept


def _falling(rows: int, columns: int) -> Tensor:
    """Scores (rows, columns), on the host, that are the same for every row."""
    return -torch.arange(columns, dtype=torch.float32, device="cpu").repeat(rows, 1)


def _masks(view: EncoderView) -> tuple[list[MaskedInput], list[MaskedInput]]:
    """The masks of heads and of units, by layer; none of an encoder that is cut."""
    heads, units = (
        [part for _, part in parts(view, (role,)) if isinstance(part, MaskedInput)]
        for role in ("attention_output", "ffn_out")
    )
    return heads, units


def _values(masks: list[MaskedInput]) -> Tensor:
    """The values of masks (n,), one a row, on the host."""
    return torch.stack([part.mask.detach().cpu() for part in masks])


def _structures(model: Recommender) -> dict[str, Tensor]:
    """The structure of every encoder that is cut, by the names of its buffers."""
    return {
        f"encoders.{modality}.{_RECORD}.{name}": value
        for modality, view in model.views.items()
        if hasattr(view.module, _RECORD)
        for name, value in view.module.get_submodule(_RECORD).named_buffers()
    }
