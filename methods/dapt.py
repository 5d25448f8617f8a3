"""DAPT (Zhou et al., CVPR 2024), for texts and images: adapters scaled per token, prompts made from their output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.token_mask import TokenMask


class DAPTConfig(MethodConfig):
    """Bottleneck width b and dropout of the adapters, prompts, and how gates and transforms start."""

    bottleneck: PositiveInt = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    prompts: bool = True
    prompt_norm: bool = True
    """In a post-norm encoder, prompts pass the last norm of their layer, as all other tokens do."""
    gate_bias: NonNegativeFloat = 1.0
    """Start of b_s, the bias of the gates; 0 as released."""
    tfts_noise: NonNegativeFloat = 0.02
    """Standard deviation of scales around 1 and of shifts around 0 at the start; 0: they change nothing."""


# --- TFTS: a scale and a shift after every frozen operation --------------------------------------------------------


SMALLEST = 1e-3
"""The least |gamma| that a gradient is divided by."""


class ScaleShift(torch.autograd.Function):
    """``z = gamma x + beta``; for the gradient of gamma it saves z, which attention and activations save anyway, not x.

    ``sum dz x = (sum dz z - beta sum dz) / gamma``; gamma starts around 1. Below ``SMALLEST`` the gradient of gamma
    shrinks with it instead of growing without bound by rounding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Map (..., D) to (..., D), in the type of x."""
        z = torch.addcmul(beta, x, gamma).to(x.dtype)
        ctx.save_for_backward(z, gamma, beta)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of x, gamma and beta."""
        z, gamma, beta = ctx.saved_tensors
        tokens = tuple(range(dz.ndim - 1))
        shift = dz.sum(tokens, dtype=gamma.dtype)
        divisor = torch.where(gamma.abs() < SMALLEST, SMALLEST, gamma)
        scale = ((dz * z).sum(tokens, dtype=gamma.dtype) - beta * shift) / divisor
        return (dz * gamma).to(dz.dtype) if ctx.needs_input_grad[0] else None, scale, shift


class FeatureTransform(nn.Module):
    """``T(x) = gamma x + beta`` per channel; gamma starts at N(1, noise), beta at N(0, noise)."""

    def __init__(self, width: int, noise: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + noise * torch.randn(width))
        self.bias = nn.Parameter(noise * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D), in the type of x."""
        if torch.compiler.is_compiling():  # which chooses itself what to save, and cannot trace the function in hooks
            return torch.addcmul(self.bias, x, self.weight).to(x.dtype)
        out: Tensor = ScaleShift.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


class TransformedLinear(nn.Linear):
    """``T(W x + b)``."""

    tfts: FeatureTransform

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D_in) to (..., D_out)."""
        out: Tensor = self.tfts(super().forward(x))
        return out


class TransformedConv2d(nn.Conv2d):
    """T after a convolution, per channel."""

    tfts: FeatureTransform

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, C, H, W) to (n, D, h, w)."""
        out: Tensor = self.tfts(super().forward(x).movedim(1, -1)).movedim(-1, 1)
        return out


class TransformedLayerNorm(nn.LayerNorm):
    """``T(LN(x))`` as one norm with scale ``gamma w`` and shift ``gamma b + beta``: no further pass over the tokens."""

    tfts: FeatureTransform

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gamma, beta = self.tfts.weight, self.tfts.bias
        shift = torch.addcmul(beta, self.bias, gamma)
        return functional.layer_norm(x, self.normalized_shape, self.weight * gamma, shift, self.eps)


_TRANSFORMED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TransformedLinear,
    nn.Conv2d: TransformedConv2d,
    nn.LayerNorm: TransformedLayerNorm,
}
_ORIGINAL = {transformed: original for original, transformed in _TRANSFORMED.items()}


def _operations(view: EncoderView) -> list[Any]:
    """The frozen operations with weights, each of which gets a transform: linear layers, norms, the patch embedding."""
    norms = [norm for layer in range(view.shape.depth) for norm in view.norms(layer)]
    if not all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms):
        raise UserError(
            f"method 'dapt': the norms of {type(view.module).__name__} have no bias to fold a shift into; choose "
            "another encoder"
        )
    return [part for part in view.module.modules() if type(part) in _TRANSFORMED]


def _fold(part: Any) -> None:
    """Fold T into the weights of its operation: ``W' = diag(gamma) W``, ``b' = gamma b + beta``."""
    gamma, beta = part.tfts.weight.detach(), part.tfts.bias.detach()
    part.weight.data.mul_(gamma.reshape(-1, *[1] * (part.weight.ndim - 1)))
    bias = beta if part.bias is None else torch.addcmul(beta, part.bias.detach(), gamma)
    part.bias = nn.Parameter(bias, requires_grad=False)
    del part.tfts
    part.__class__ = _ORIGINAL[type(part)]


# --- dynamic adapters and internal prompts --------------------------------------------------------------------------


class DynamicAdapter(nn.Module):
    """``A(u) = g (drop(gelu(v W_down + b_down)) W_up + b_up)``, ``v = LN(u)``, ``g = relu(v w_s + b_s)`` per token.

    W_up, b_down and b_up start at zero, W_down and w_s Kaiming-uniform (a = sqrt 5): A(u) = 0. Where the layer adds a
    prompt, it is ``p = T(mean over tokens of gelu(A(u)))``.

    Args:
        width: D. prompts: number of prompts that earlier layers have added. prompt: this layer adds one.
    """

    def __init__(self, width: int, config: DAPTConfig, prompts: int, *, prompt: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 1)
        self.down, self.up = nn.Linear(width, config.bottleneck), nn.Linear(config.bottleneck, width)
        self.dropout = nn.Dropout(config.dropout)
        self.prompt = FeatureTransform(width, config.tfts_noise) if prompt else None
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        nn.init.constant_(self.gate.bias, config.gate_bias)
        self.prompts = prompts
        self.output: Tensor | None = None
        """A(u), (n, T, D), while the layer runs."""
        self.closed: Tensor | None = None
        """(2,) of the last training step: how many tokens had g = 0, and how many there were."""

    def forward(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """A(u), (n, T, D), of normalised states u (n, T, D); ``mask`` (n, T) is true for real tokens."""
        v = self.norm(u)
        gates = functional.relu(self.gate(v))
        if self.training:
            closed = gates.detach()[..., 0] == 0
            real = torch.ones_like(closed) if mask is None else mask
            self.closed = torch.stack([(closed & real).sum(), real.sum()])
        # The gate scales the narrow activation, so no tensor as wide as the output is saved for it.
        out = functional.linear(gates * self.dropout(functional.gelu(self.down(v))), self.up.weight)
        return torch.addcmul(out, gates, self.up.bias).to(out.dtype)

    def make_prompt(self, output: Tensor, mask: Tensor | None) -> Tensor:
        """The prompt (n, 1, D) of A(u) (n, T, D)."""
        assert self.prompt is not None
        states = functional.gelu(output)
        if mask is None:
            mean = states.mean(1, keepdim=True)
        else:
            kept = mask[:, None].to(states.dtype)
            mean = kept @ states / mask.sum(1)[:, None, None]
        prompt: Tensor = self.prompt(mean)
        return prompt


class TokenCount:
    """T, the number of tokens in the running forward pass before any prompt is added."""

    def __init__(self) -> None:
        self.value = 0


class DAPT(Method):
    """Adds adapters scaled per token, prompts made from their output, and a scale and shift after every frozen
    operation.

    ``y = x + FFN(u) + g W_up gelu(W_down v), g = relu(w_s v + b_s), v = LN(u)`` in a pre-norm layer (ViT), with u =
    T(LN(x)); A(u) is the last term, and g one gate a token. TFTS, the transform ``T(x) = gamma x + beta``, follows
    every linear layer, every norm and the patch embedding; gamma starts at N(1, 0.02), beta at N(0, 0.02), so the
    encoder does not start as the frozen one. Every layer but the last, whose prompt nothing would read, inserts
    ``p = T(mean over tokens of gelu(A(u)))`` after token 0: the sequence grows by one token a layer. Prompts have no
    position and are never read; the mean leaves out padding. The item encoder reads the tokens that it reads of the
    frozen encoder.

    Reconstruction: the paper adapts point clouds. In a post-norm layer (BERT) ``y = T(LN(u + FFN(u) + A(u)))`` with the
    input u of the feed-forward sub-layer, and a prompt passes T(LN(p)) as the other tokens do (``prompt_norm``; with
    ``tfts_noise = 0`` that norm starts at p = 0, where its gradient is 1 / sqrt(eps)). b_s starts at 1 instead of 0
    (``gate_bias``): where only token 0 is read, the last layer learns from it alone, and with 0 every second model
    starts with that gate closed for all items and never opens it. The norms of the embeddings have a T as well; a text
    encoder without one (CLIP) has none there. Encoders whose norms have no bias (Llama, ModernBERT) are refused.

    Trains: adapters, gates, prompts and transforms (b = 64): 1,438,476 in BERT-base, 1,440,012 in ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; training needs about the memory of full fine-tuning,
    because every transform keeps its output; inference costs the adapters and one more token a layer, transforms are
    folded.
    Source: Zhou et al., Dynamic Adapter Meets Prompt Tuning, CVPR 2024.
    """

    Config = DAPTConfig
    config: DAPTConfig
    identity_at_start = False

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Put transforms after all operations, and an adapter and a prompt into every layer."""
        for view in model.views.values():
            for part in _operations(view):
                part.tfts = FeatureTransform(part.weight.shape[0], self.config.tfts_noise)
                part.__class__ = _TRANSFORMED[type(part)]
            width, last = view.shape.width, view.shape.depth - 1
            if self.config.prompts:
                adapters = [DynamicAdapter(width, self.config, i, prompt=i < last) for i in range(last + 1)]
            else:
                adapters = [DynamicAdapter(width, self.config, 0, prompt=False) for _ in view.layers]
            view.module.add_module("dapt", nn.ModuleList(adapters))
            _install(view, adapters, prompt_norm=self.config.prompt_norm)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """L adapters of 2 D b + b + 4 D + 1; a scale and a shift per channel of L - 1 prompts and all operations."""
        total = fusion_parameters(task)
        for view in views.values():
            width, depth, b = view.shape.width, view.shape.depth, self.config.bottleneck
            channels = sum(part.weight.shape[0] for part in _operations(view))
            prompts = (depth - 1) * width if self.config.prompts else 0
            total += depth * (2 * width * b + b + 4 * width + 1) + 2 * (channels + prompts)
        return total

    def prepare_inference(self, model: Recommender) -> None:
        """Fold every transform into the weights of its operation; adapters and prompts stay."""
        for part in list(model.encoders.modules()):
            if type(part) in _ORIGINAL:
                _fold(part)

    def report(self, model: Recommender) -> dict[str, float]:
        """Share of the tokens with a closed gate in the last training step: mean and maximum over the layers."""
        shares: dict[str, float] = {}
        for modality, view in model.views.items():
            adapters: Any = view.module.get_submodule("dapt")
            counts = [adapter.closed for adapter in adapters if adapter.closed is not None]
            if counts:
                none, every = model.whole.total(torch.stack(counts)).unbind(1)
                closed = (none / every).tolist()
                shares[f"{modality}_zero_gates"] = sum(closed) / len(closed)
                shares[f"{modality}_zero_gates_max"] = max(closed)
        return shares


# --- inside the layers ----------------------------------------------------------------------------------------------


def _install(view: EncoderView, adapters: list[DynamicAdapter], *, prompt_norm: bool) -> None:
    """Make every layer run its adapter beside the feed-forward sub-layer and add its prompt.

    Whatever a layer stores is set and used within its forward, which activation checkpointing repeats as a whole.
    """
    mask, count = TokenMask.of(view), TokenCount()
    view.embeddings.register_forward_hook(partial(_count, count))
    view.reads_mask = partial(_item_tokens, count)
    post_norm = view.final_norm is None
    ffn_in = [view.module.get_submodule(name) for name in view.projections("ffn_in")]
    for i, (layer, adapter) in enumerate(zip(view.layers, adapters, strict=True)):
        # The first linear layer of the feed-forward sub-layer reads u, the normalised states.
        ffn_in[i].register_forward_pre_hook(partial(_adapt, adapter, mask))
        view.sublayer_outputs(i)[1].register_forward_hook(partial(_add, adapter))
        norm = view.norms(i)[1] if post_norm and prompt_norm else None
        layer.forward = partial(_run_layer, layer.forward, adapter, mask, norm)


def _adapt(adapter: DynamicAdapter, mask: TokenMask, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    adapter.output = adapter(args[0], _with_prompts(mask, args[0]))


def _add(adapter: DynamicAdapter, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
    assert adapter.output is not None
    return output + adapter.output


def _run_layer(
    forward: Callable[..., Any],
    adapter: DynamicAdapter,
    mask: TokenMask,
    norm: nn.Module | None,
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a layer on a sequence with the prompts of earlier layers, and insert its own after token 0."""
    grow = partial(_grow, adapter.prompts, hidden)
    try:
        result = forward(hidden, *map(grow, args), **{name: grow(value) for name, value in kwargs.items()})
        if adapter.prompt is None:
            return result
        states, *rest = result if isinstance(result, tuple) else (result,)
        assert adapter.output is not None
        prompt = adapter.make_prompt(adapter.output, _with_prompts(mask, states))
        prompt = prompt if norm is None else norm(prompt)
        states = torch.cat([states[:, :1], prompt.to(states.dtype), states[:, 1:]], dim=1)
        return (states, *rest) if isinstance(result, tuple) else states
    finally:
        adapter.output = None  # a kept activation would prevent a deep copy of the model


def _grow(prompts: int, hidden: Tensor, value: Any) -> Any:
    """An attention mask or position bias for a sequence with ``prompts``, which get that of token 0.

    Masks are (n, T), (n, 1, T, T) or similar, depending on the attention in use; other arguments stay as they are.
    """
    tokens = hidden.shape[1] - prompts
    if not prompts or not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != tokens:
        return value
    value = torch.cat([value[..., :1].expand(*value.shape[:-1], prompts), value], dim=-1)
    if value.ndim == 2 or value.shape[-2] != tokens:
        return value
    first = value[..., :1, :]
    return torch.cat([first.expand(*value.shape[:-2], prompts, -1), value], dim=-2)


def _with_prompts(mask: TokenMask, hidden: Tensor) -> Tensor | None:
    """The mask (n, T') of a sequence (n, T', D) with prompts; they are real tokens, as token 0 always is."""
    if mask.value is None:
        return None
    prompts = hidden.shape[1] - mask.value.shape[1]
    return torch.cat([mask.value[:, :1].expand(-1, prompts), mask.value], dim=1)


def _count(count: TokenCount, _module: nn.Module, _args: object, hidden: Tensor) -> None:
    count.value = hidden.shape[1]


def _item_tokens(count: TokenCount, mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask (n, T') of a state: that of the item's tokens, without the prompts."""
    if mask is None:
        mask = torch.ones(len(hidden), count.value, dtype=torch.bool, device=hidden.device)
    prompts = hidden.shape[1] - mask.shape[1]
    return torch.cat([mask[:, :1], mask.new_zeros(len(mask), prompts), mask[:, 1:]], dim=1)
