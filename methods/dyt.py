"""DyT (Zhao et al., NeurIPS 2024): adapters, and dispatchers that let tokens skip the feed-forward sub-layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.dealing import WholeBatch
from tpme.bench.task.families import Role
from tpme.bench.task.loss import at_least_float32
from tpme.bench.task.recommender import ItemEncoder, Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, PassOutput, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.experts import AdapterExperts, Mixing, expert_parameters
from tpme.methods.parts.parallel import ParallelBottleneck, add_parallel
from tpme.methods.parts.token_mask import TokenMask

RATE_WEIGHT = 2.0
"""Weight of the rate's term of the loss, as released; all others have weight 1."""
_CLAMP = 1e-6
"""Uniform noise stays this far from 0 and 1: its logit must be finite."""


class DyTConfig(MethodConfig):
    """The dispatchers (where they are, target rate r, temperature tau), the adapters, and the terms of the loss.

    dispatch_encoders: the encoders with dispatchers; any other has adapters only. complete_loss: a second pass in
    every step, in which no token skips anything. distill: the first pass also learns from the second, if there is one.
    """

    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: PositiveFloat = 5.0
    bottleneck: PositiveInt = 64
    scale: PositiveFloat = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    experts: PositiveInt = 1
    mixing: Mixing = "merge"
    dispatch_encoders: Literal["both", "text", "image"] = "both"
    complete_loss: bool = True
    distill: bool = True


class AdapterBeside(nn.Module):
    """``f + A(x)``: the sub-layer and the adapter, for every token."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Map x and f, (n, T, D) each, to (n, T, D)."""
        out: Tensor = f + self.adapter(x)
        return out


class TokenDispatch(AdapterBeside):
    """``m f + A(x)``: ``s = x w + b``, one number a token, decides which tokens pass the sub-layer.

    In training, all tokens pass it and are masked: ``m = 1[s + noise > 0]`` with logistic noise, the difference of two
    Gumbel variables; the gradient is that of ``sigmoid((s + noise) / tau)``. In evaluation only the chosen tokens,
    ``s > 0``, are gathered and computed. The token that stands for the item (the last real one where the
    encoder is read there, else token 0) has m = 1, padding m = 0; neither counts for the rate.

    Attributes:
        complete: in training, every token passes.
        decided: (2,) of each dynamic forward pass: how many tokens passed, and how many could have. ``None``: not kept.
        counted: (2,) int64, the same, summed over the evaluations since it was reset.

    Args:
        width: D. adapter: A. tokens: of the encoder. whole: batch. last: its items are read at the last token.
        temperature: tau.
    """

    def __init__(
        self,
        width: int,
        adapter: nn.Module,
        tokens: TokenMask,
        whole: WholeBatch,
        *,
        last: bool,
        temperature: float,
    ) -> None:
        super().__init__(adapter)
        self.whole = whole
        self.dispatcher = nn.Linear(width, 1)
        nn.init.trunc_normal_(self.dispatcher.weight, std=0.02)
        nn.init.zeros_(self.dispatcher.bias)
        self.tokens, self.last, self.temperature = tokens, last, temperature
        self.complete = False
        self.decided: list[Tensor] | None = None
        self.counted: Tensor | None = None
        self._chosen: Tensor | None = None

    def choose(self, x: Tensor) -> Tensor:
        """In evaluation, note the positions of the chosen tokens among all n T; returns x, (n, T, D)."""
        if not self.training and not x.is_meta:  # how many there are is not known on meta
            always, free = self._roles(x)
            passes = free & (self._logits(x) > 0)
            counts = torch.stack([passes.sum(), free.sum()])
            self.counted = counts if self.counted is None else self.counted + counts
            self._chosen = (passes | always).flatten().nonzero()[:, 0]
        return x

    def gather(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before a projection of the sub-layer: replace (n, T, D) by the chosen tokens (1, m, D), if there are any."""
        if self._chosen is None:
            return None
        return args[0].flatten(0, 1).index_select(0, self._chosen)[None], *args[1:]

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Map x, (n, T, D), and f, that of all tokens or of the chosen ones, to (n, T, D)."""
        if self._chosen is not None:
            chosen, self._chosen = self._chosen, None
            out: Tensor = self.adapter(x).to(f.dtype)
            out.view(-1, out.shape[2]).index_add_(0, chosen, f[0])
            return out
        if self.training and self.complete:
            return super().forward(x, f)
        return torch.addcmul(self.adapter(x).to(f.dtype), self._mask(x)[..., None].to(f.dtype), f)

    def _mask(self, x: Tensor) -> Tensor:
        """m, (n, T): exactly 0 or 1, with the gradient of the relaxation."""
        always, free = self._roles(x)
        logits = self._logits(x)
        if self.training:
            logits = logits + self.whole.rand_like(logits).logit(eps=_CLAMP)
        soft = (logits / self.temperature).sigmoid()
        straight = (logits > 0).to(soft.dtype) + (soft - soft.detach())
        mask = torch.where(free, straight, always.to(soft.dtype))
        if self.decided is not None:
            self.decided.append(torch.stack([mask.sum() - len(x), free.sum()]))  # one token an item always passes
        return mask

    def _logits(self, x: Tensor) -> Tensor:
        """s, (n, T), at least in float32: half precision has too few digits for the noise."""
        return at_least_float32(self.dispatcher(x)[..., 0])

    def _roles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that always pass, and those that the dispatcher decides on, (n, T) bool each."""
        places, real = torch.arange(x.shape[1], device=x.device), self.tokens.value
        if real is None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        read = (real * (places + 1)).argmax(1, keepdim=True) if self.last else torch.zeros_like(places[:1])
        always = (places == read).expand_as(real)
        return always, real & ~always


class DyT(Method):
    """Lets only the tokens that a dispatcher chooses pass each feed-forward sub-layer; an adapter beside it reads all
    tokens.

    ``y = x + m FFN(LN x) + s W_up relu(W_down x), m = 1[w x + b > 0]`` in a pre-norm encoder,
    ``y = LN(x + m FFN(x) + A(x))`` in a post-norm one. x, (n, T, D), is the input of the feed-forward half, A(x) the
    adapter's term; m is one bit a token and layer (``TokenDispatch``). W_up and the biases start at zero, the
    dispatchers at N(0, 0.02). A step has two passes, dynamic and complete (m = 1), with logits z and z_c:
    ``L = CE(z) + CE(z_c) + KL(softmax(sg z_c) || softmax(z)) + 2 sum_encoders (mean(m) - r)^2``, sg the stop-gradient;
    mean(m) is over all layers, items and tokens that are decided on. Evaluation draws no noise, so its rate
    (``report``) may miss r while many logits are near 0. The defaults are those of the full image data sets (b = 64, s
    = 0.1), losses and initialisation as released. ``complete_loss = false`` drops the second pass, which halves the
    time of a step.

    Reconstruction: the post-norm form; the losses on in-batch scores, with a term of the rate for each encoder; padding
    never passes; in encoders without a [CLS] token the token that is read, or token 0, always passes. The mixture of
    ``experts`` follows the paper's figure: their weights are a softmax over the mean token (``AdapterExperts``). An
    encoder that is not in ``dispatch_encoders`` has adapters and no dispatchers.

    Trains: adapters and dispatchers (b = 64): 1,198,860 each in BERT-base and ViT-B/16.
    Saves: about the share 1 - r of the feed-forward FLOPs at inference, less those of the adapters, and stored size; a
    step costs more FLOPs and memory than full fine-tuning's, because it has two passes.
    Source: Zhao et al., Dynamic Tuning, NeurIPS 2024.
    """

    Config = DyTConfig
    config: DyTConfig
    identity_at_start = False

    def __init__(self, config: DyTConfig) -> None:
        super().__init__(config)
        self._dispatches: dict[Modality, list[TokenDispatch]] = {}

    def item_encoder(self, task: TaskShape) -> ItemEncoder:
        """The default. Raises UserError where the row lacks the encoder that should have dispatchers."""
        wanted = self.config.dispatch_encoders
        if wanted != "both" and wanted not in task.encoders:
            raise UserError(
                f"method 'dyt': dispatch_encoders = '{wanted}', but this row has no {wanted} encoder; choose 'both'"
            )
        return super().item_encoder(task)

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Put a branch beside the feed-forward sub-layer of every layer."""
        for modality, view in model.views.items():
            branches = nn.ModuleList(self._branch(modality, view) for _ in view.layers)
            view.module.add_module("dyt", branches)
            for layer, branch in enumerate(branches):
                if isinstance(branch, TokenDispatch):
                    _gather_inputs(view, layer, branch)
                add_parallel(view, layer, branch)

    def _branch(self, modality: Modality, view: EncoderView) -> AdapterBeside:
        config, width, tokens = self.config, view.shape.width, TokenMask.of(view)
        adapter: nn.Module
        if config.experts == 1:
            adapter = ParallelBottleneck(width, config.bottleneck, config.scale, config.dropout)
        else:
            adapter = AdapterExperts(
                width, config.bottleneck, config.scale, config.dropout, config.experts, config.mixing, tokens
            )
        if config.dispatch_encoders not in ("both", modality):
            return AdapterBeside(adapter)
        last = view.shape.pool == "last"
        return TokenDispatch(width, adapter, tokens, view.whole, last=last, temperature=config.temperature)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """An adapter, 2 D b + b + D, and a dispatcher, D + 1, in each of L layers."""
        total = fusion_parameters(task)
        for modality, shape in task.encoders.items():
            dispatcher = shape.width + 1 if self.config.dispatch_encoders in ("both", modality) else 0
            adapter = expert_parameters(shape.width, self.config.bottleneck, self.config.experts)
            total += shape.depth * (adapter + dispatcher)
        return total

    # --- the two passes of a step -------------------------------------------------------------------------------

    def passes(self) -> tuple[str, ...]:
        """The dynamic pass, then the complete one."""
        return ("dynamic", "complete") if self.config.complete_loss else ("dynamic",)

    def begin_pass(self, name: str, model: Recommender) -> None:
        """Switch to a pass; the dynamic one keeps what its dispatchers decide."""
        self._dispatches = _dispatches(model)
        for part in _all(self._dispatches):
            part.complete = name == "complete"
            if not part.complete:
                part.decided, part.counted = [], None

    def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
        """The task's loss of each pass, distillation, and the rate of each encoder; forgets what was decided."""
        terms = super().losses(outputs)
        if self.config.distill and "complete" in outputs:
            student, teacher = (outputs[name].logits for name in ("dynamic", "complete"))
            divergence = functional.kl_div(
                student.log_softmax(1), teacher.detach().log_softmax(1), log_target=True, reduction="sum"
            )
            terms["distill"] = divergence / outputs["dynamic"].divisor
        for modality, parts in self._dispatches.items():
            decided = [counts for part in parts for counts in part.decided or ()]
            selected, seen = parts[0].whole.sum(torch.stack(decided).sum(0))
            terms[f"{modality}_rate"] = RATE_WEIGHT * (selected / seen.clamp(min=1) - self.config.rate) ** 2
        for part in _all(self._dispatches):
            part.complete, part.decided = False, None
        return terms

    def report(self, model: Recommender) -> dict[str, float]:
        """Share of the tokens that passed in the evaluations since the last step, for each encoder and layer."""
        shares = {}
        for modality, parts in _dispatches(model).items():
            counts = [part.whole.total(part.counted) for part in parts if part.counted is not None]
            if counts:
                shares[f"{modality}_tokens_passed"] = _share(torch.stack(counts).sum(0))
            for layer, each in enumerate(counts):
                shares[f"{modality}_tokens_passed_layer_{layer}"] = _share(each)
        return shares


def _dispatches(model: Recommender) -> dict[Modality, list[TokenDispatch]]:
    """The dispatchers of every encoder that has any, by layer."""
    found = {
        modality: [part for part in view.module.get_submodule("dyt").children() if isinstance(part, TokenDispatch)]
        for modality, view in model.views.items()
    }
    return {modality: parts for modality, parts in found.items() if parts}


def _all(dispatches: Mapping[Modality, list[TokenDispatch]]) -> list[TokenDispatch]:
    return [part for parts in dispatches.values() for part in parts]


def _share(counts: Tensor) -> float:
    passed, seen = counts.tolist()
    return passed / seen if seen else math.nan


def _gather_inputs(view: EncoderView, layer: int, part: TokenDispatch) -> None:
    """Choose tokens between the halves of a layer; its first projections then get these alone."""
    view.insert_between(layer, part.choose)
    roles: tuple[Role, ...] = ("ffn_in", "ffn_gate")
    for role in roles:
        with suppress(UserError):  # most encoders have no gate
            view.module.get_submodule(view.projections(role)[layer]).register_forward_pre_hook(part.gather)
