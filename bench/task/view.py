"""A common view of transformer encoders: the layers, projections and sub-layers of BERT, ViT and their relatives.

Methods use roles instead of module paths, which differ between encoders and versions of transformers. A role is looked
up under all known paths, relative to one layer; if none exists, a UserError says so in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.masks import unread_masks

Role = Literal["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]

_LAYER_LISTS = ("encoder.layer", "layers", "encoder.layers", "transformer.layer", "model.layer")
_ROLES: dict[Role, tuple[str, ...]] = {
    "query": (
        "attention.self.query",
        "attention.q_proj",
        "attention.attention.query",
        "self_attn.q_proj",
        "attention.q_lin",
        "attention.attn.q",
        "attention.self.query_proj",
    ),
    "key": (
        "attention.self.key",
        "attention.k_proj",
        "attention.attention.key",
        "self_attn.k_proj",
        "attention.k_lin",
        "attention.attn.k",
        "attention.self.key_proj",
    ),
    "value": (
        "attention.self.value",
        "attention.v_proj",
        "attention.attention.value",
        "self_attn.v_proj",
        "attention.v_lin",
        "attention.attn.v",
        "attention.self.value_proj",
    ),
    "attention_output": (
        "attention.output.dense",
        "attention.o_proj",
        "self_attn.out_proj",
        "attention.out_lin",
        "attention.attn.o",
    ),
    "ffn_in": ("intermediate.dense", "mlp.fc1", "ffn.lin1", "mlp.up_proj"),
    "ffn_out": ("output.dense", "mlp.fc2", "ffn.lin2", "mlp.down_proj"),
}
# Modules whose output is a sub-layer's output without its residual. BERT applies dropout before it adds and normalises,
# so an adapter after the dropout is exactly where Houlsby et al. put it; elsewhere it follows the projection.
_SUBLAYER_OUTPUTS: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("attention.output.dropout", *_ROLES["attention_output"]),
    ("output.dropout", *_ROLES["ffn_out"]),
)

# Set on every module of the unmodified encoder: the names of its own parameters. An attribute, not a table of ids: ids
# are reused once a method drops a module, and attributes survive a deep copy of the model.
_OWN = "_tpme_own_parameters"


def _find(root: nn.Module, paths: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    for path in paths:
        try:
            return path, root.get_submodule(path)
        except AttributeError:
            continue
    return None


class EncoderView:
    """The parts of one text or image encoder, by role.

    Args:
        module: a transformers encoder that returns ``last_hidden_state``.
        modality: the item input it reads.
        mean, std: normalisation of images in [0, 1], per channel.
    """

    def __init__(
        self,
        module: nn.Module,
        modality: Modality,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        self.module = module
        self.modality = modality
        # In units of uint8 pixels; moved to the images' device on first use.
        self._shift, self._scale = (torch.tensor(values)[:, None, None] * 255 for values in (mean, std))
        layers = _find(module, _LAYER_LISTS)
        if layers is None:
            raise UserError(
                f"{type(module).__name__} ({modality} encoder): its list of layers is at none of the known paths "
                f"({', '.join(_LAYER_LISTS)}); choose an encoder of the BERT or ViT family"
            )
        self._layers_path = layers[0]
        if any(getattr(part, "is_causal", False) is True for part in module.modules()):
            raise UserError(
                f"{type(module).__name__} ({modality} encoder): its attention is causal, so token 0 sees no other "
                "token; choose an encoder of the BERT or ViT family"
            )
        for part in module.modules():
            setattr(part, _OWN, tuple(name for name, _ in part.named_parameters(recurse=False)))

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer layers, first to last."""
        return list(self.module.get_submodule(self._layers_path).children())

    @property
    def shape(self) -> EncoderShape:
        """Width of the hidden states and number of layers."""
        config: Any = self.module.config
        return EncoderShape(width=int(config.hidden_size), depth=len(self.layers))

    @property
    def embeddings(self) -> nn.Module:
        """The module whose output is hidden state 0, (n, tokens, width)."""
        embeddings = _find(self.module, ("embeddings",))
        if embeddings is None:
            raise UserError(
                f"{type(self.module).__name__} ({self.modality} encoder): it has no 'embeddings'; "
                "choose an encoder of the BERT or ViT family"
            )
        return embeddings[1]

    def projections(self, *roles: Role) -> list[str]:
        """Qualified names of the linear layers with these ``roles``, in all layers.

        Raises UserError if one of them is at none of the known paths.
        """
        return [
            f"{self._layers_path}.{i}.{path}" for i in range(len(self.layers)) for path in self._role_paths(i, roles)
        ]

    def _role_paths(self, layer: int, roles: tuple[Role, ...]) -> list[str]:
        return [self._locate(layer, _ROLES[role], role)[0] for role in roles]

    def sublayer_outputs(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Modules whose outputs are those of the attention and feed-forward sub-layers, before the residual."""
        attention, ffn = (self._locate(layer, paths, "sub-layer output")[1] for paths in _SUBLAYER_OUTPUTS)
        return attention, ffn

    def _locate(self, layer: int, paths: tuple[str, ...], role: str) -> tuple[str, nn.Module]:
        part = _find(self.layers[layer], paths)
        if part is None:
            raise UserError(
                f"{type(self.module).__name__} ({self.modality} encoder), layer {layer}: no '{role}' at any known "
                f"path ({', '.join(paths)}); choose an encoder of the BERT or ViT family"
            )
        return part

    # --- running it ---------------------------------------------------------------------------------------------

    def encode(
        self,
        reads: Reads,
        *,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """Run the encoder and keep only the hidden states in ``reads``.

        Args:
            reads: the hidden states to return; only token 0 of each is kept.
            tokens, token_mask: (n, T) int64, for a text encoder.
            image: (n, 3, H, W) uint8, for an image encoder.

        Returns:
            (n, reads.count, width), levels in the order of ``reads``, the final state last.
        """
        kept: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for level in reads.levels:
                hooks.enter_context(self._keep(level, kept))
            if self.modality == "text":
                hooks.enter_context(unread_masks())
                output = self.module(input_ids=tokens, attention_mask=token_mask)
            else:
                assert image is not None
                output = self.module(pixel_values=self._normalise(image))
        states = [kept[level] for level in reads.levels]
        if reads.final:
            states.append(output.last_hidden_state[:, 0])
        return torch.stack(states, dim=1)

    @contextmanager
    def _keep(self, level: int, kept: dict[int, Tensor]) -> Iterator[None]:
        # Without gradients, clone: a view would keep all tokens of the level in memory until the encoder is done.
        def first_token(hidden: Tensor) -> Tensor:
            return hidden[:, 0] if torch.is_grad_enabled() else hidden[:, 0].clone()

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[level] = first_token(args[0])

        def after(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept[level] = first_token(output[0] if isinstance(output, tuple) else output)

        if level == 0:
            handle = self.layers[0].register_forward_pre_hook(before)
        else:
            handle = self.layers[level - 1].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def _normalise(self, image: Tensor) -> Tensor:
        """Scale uint8 pixels to [0, 1] and normalise them, on their device."""
        if self._shift.device != image.device:
            self._shift, self._scale = self._shift.to(image.device), self._scale.to(image.device)
        return (image.float() - self._shift) / self._scale

    # --- training it --------------------------------------------------------------------------------------------

    def checkpoint_activations(self) -> None:
        """Keep only layer inputs for the backward pass and recompute the rest (Chen et al., 2016).

        The switch of transformers has no effect in eval mode, in which frozen layers run here.
        """
        for layer in self.layers:
            layer.forward = partial(_checkpointed, layer.forward)

    def set_mode(self, training: bool) -> None:
        """Set train or eval mode; a layer's own modules train only if a weight matrix of that layer does.

        Frozen layers must not apply dropout (cached states have none). Modules added by a method follow ``training``
        whatever their layer does. Everything outside the layers is treated as one more layer.
        """
        self.module.train(training)
        layers = [list(layer.modules()) for layer in self.layers]
        inside = {part for layer in layers for part in layer}
        outside = [part for part in self.module.modules() if part not in inside]
        for parts in (*layers, outside):
            own = [part for part in parts if hasattr(part, _OWN)]
            trains = training and any(_has_trainable_matrix(part) for part in own)
            for part in own:
                part.training = trains


def _has_trainable_matrix(part: nn.Module) -> bool:
    own = (getattr(part, name, None) for name in getattr(part, _OWN))
    return any(isinstance(value, nn.Parameter) and value.requires_grad and value.ndim > 1 for value in own)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
