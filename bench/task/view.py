"""A common view of transformer encoders: layers, projections, norms and halves of BERT, ViT, CLIP, Llama and others.

Methods use roles instead of module paths, which differ between encoders and versions of transformers; ``families.py``
knows the paths. What an encoder does not have is refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpme.bench.errors import UserError
from tpme.bench.record import Modality, Pool
from tpme.bench.task.blocked_attention import choose_attention
from tpme.bench.task.dealing import WholeBatch
from tpme.bench.task.families import Halves, Paths, Role, drop_unread, family_of, split_fused
from tpme.bench.task.items import EncoderShape, Reads, States, TokenStates
from tpme.bench.task.masks import unread_masks
from tpme.bench.task.pooling import pool_tokens

# Set on every module of the unmodified encoder: the names of its own parameters. An attribute, not a table of ids: ids
# are reused once a method drops a module, and attributes survive a deep copy of the model.
_OWN = "_tpme_own_parameters"


@dataclass(frozen=True)
class Heads:
    """The attention heads of every layer: how many, how many key-value heads they share, and the width of each."""

    number: int
    key_value: int
    width: int


class EncoderView:
    """The parts of one text or image encoder, by role.

    Args:
        module: an encoder of transformers, of one of the supported families. What no hidden state depends on (a
            pooler, a head) is dropped from it, and fused projections are split.
        modality: the item input it reads.
        mean, std: normalisation of images in [0, 1], per channel.
        pool: how its items are read unless a method says otherwise; ``None``: as its family is.
        padding: token id behind texts that are padded without a mask; ``None``: that of the configuration.
        attention: the implementation that was asked for, which the encoder has; ``None``: ``choose_attention``'s.

    Raises UserError for an encoder of another family, and for a pooling that it does not support.
    """

    def __init__(
        self,
        module: nn.Module,
        modality: Modality,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        *,
        pool: Pool | None = None,
        padding: int | None = None,
        attention: str | None = None,
    ) -> None:
        self.module = module
        self.modality = modality
        config: Any = module.config
        self.config = config
        self.family = family_of(getattr(self.config, "model_type", None))
        # In units of uint8 pixels; moved to the images' device on first use.
        self._shift, self._scale = (torch.tensor(values)[:, None, None] * 255 for values in (mean, std))
        causal = any(getattr(part, "is_causal", False) is True for part in module.modules())
        if causal and "first" in self.family.pools:
            raise UserError(
                f"{self._name}: its attention is causal (is_decoder); choose an encoder with bidirectional attention"
            )
        drop_unread(module, self.family)
        split_fused(module, self.family)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # the cache of keys and values is for generation
        if attention is None:
            choose_attention(module)
        self.pool = pool or self.family.pools[0]
        self._padding = int(getattr(config, "pad_token_id", None) or 0) if padding is None else padding
        self.shape.check(Reads(pool=self.pool), self._name)
        self.reads_mask: Callable[[Tensor | None, Tensor], Tensor] | None = None
        """Set by a method that changes the number of tokens: from the mask (n, T) of a text, or ``None`` for an image,
        and a state (n, T', width), the mask (n, T') of that state, false for tokens that are not the item's; or, as
        float, the weights of its tokens in a mean, 0 for those."""
        self.whole = WholeBatch()
        """What a method may do over the items of the whole batch; that of the recommender."""
        for part in module.modules():
            setattr(part, _OWN, tuple(name for name, _ in part.named_parameters(recurse=False)))

    @property
    def _name(self) -> str:
        return f"{type(self.module).__name__} ({self.modality} encoder)"

    # --- its parts ----------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer layers, first to last."""
        return list(self.module.get_submodule(self.family.layers).children())

    @property
    def shape(self) -> EncoderShape:
        """Width of the hidden states, number of layers and heads, and how they are read."""
        return EncoderShape(
            int(self.config.hidden_size),
            len(self.layers),
            self.pool,
            self.family.pools,
            final_norm=self.family.norm is not None,
            heads=int(self.config.num_attention_heads),
        )

    @property
    def heads(self) -> Heads:
        """The attention heads of every layer."""
        number = int(self.config.num_attention_heads)
        shared = int(getattr(self.config, "num_key_value_heads", None) or number)
        return Heads(number, shared, int(getattr(self.config, "head_dim", None) or self.shape.width // number))

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward activation, the input of the role ``ffn_out``."""
        path, _ = self._locate(0, self.family.layer.roles["ffn_out"], "ffn_out")
        linear: Any = self.layers[0].get_submodule(path)
        return int(linear.in_features)

    @property
    def embeddings(self) -> nn.Module:
        """The module whose output is hidden state 0, (n, tokens, width)."""
        return next(self.module.get_submodule(path) for path in self.family.embeddings if _has(self.module, path))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm of the final state; ``None`` where the last layer ends with its own (BERT)."""
        return self.module.get_submodule(self.family.norm) if self.family.norm else None

    def projections(self, *roles: Role) -> list[str]:
        """Qualified names of the linear layers with these ``roles``, in all layers.

        Raises UserError for a role that the encoder does not have (``ffn_gate`` without a gate).
        """
        return [
            f"{self.family.layers}.{i}.{self._locate(i, self.family.layer.roles.get(role, ()), role)[0]}"
            for i in range(len(self.layers))
            for role in roles
        ]

    def sublayer_outputs(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Modules whose outputs are those of the attention and feed-forward sub-layers, before the residual."""
        attention, ffn = (self._locate(layer, paths, "sub-layer output")[1] for paths in self.family.layer.outputs)
        return attention, ffn

    def norms(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The norms of the attention and the feed-forward sub-layer; ``nn.Identity`` where one has none."""
        attention, ffn = (self.layers[layer].get_submodule(path) for path in self.family.layer.norms)
        return attention, ffn

    def halves(self, layer: int) -> Halves:
        """The attention part and the feed-forward part of a layer, residuals and norms included."""
        return self.family.layer.halves(self.layers[layer])

    def insert_between(self, layer: int, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to hidden states (n, T, width) between the two halves of a layer, after earlier ones.

        A partial or a module, not a closure: a deep copy of the model then runs its own copy. A module has to be
        registered in the encoder by the method, so that its parameters are found.
        """
        target: Any = self.layers[layer]
        if isinstance(target.forward, partial) and target.forward.func is _through_halves:
            target.forward.args[1].append(change)
        else:
            target.forward = partial(_through_halves, self.halves(layer), [change], self.family.layer.tuples)

    def _locate(self, layer: int, paths: Paths, role: str) -> tuple[str, nn.Module]:
        root = self.layers[layer]
        for path in paths:
            if _has(root, path):
                return path, root.get_submodule(path)
        raise UserError(f"{self._name}, layer {layer}: it has no '{role}'; leave that out or choose another encoder")

    # --- running it ---------------------------------------------------------------------------------------------

    def encode(
        self,
        reads: Reads,
        *,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> States:
        """Run the encoder and keep only the hidden states in ``reads``.

        Args:
            reads: the hidden states to return, and how each is pooled over its tokens.
            tokens, token_mask: (n, T) int64, for a text encoder.
            image: (n, 3, H, W) uint8, for an image encoder.

        Returns:
            (n, reads.count, width), levels in the order of ``reads``, the final state last; for ``tokens = "all"``
            ``TokenStates``, those of every token. In float32 where the encoder's weights are in half precision.
        """
        self.shape.check(reads, self._name)
        inputs, mask = self._inputs(tokens, token_mask, image)
        kept: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            read = partial(self._read, reads, mask)
            for level in reads.levels:
                hooks.enter_context(self._keep(level, kept, read))
            hooks.enter_context(unread_masks())
            final = self.module(**inputs).last_hidden_state
        states = [kept[level] for level in reads.levels]
        if reads.final:
            norm = self.final_norm if self.family.norm_outside else None
            states.append(read(norm(final) if norm is not None else final))
        every = reads.tokens == "all"
        # Every token: level by level in memory, because side networks multiply one level at a time.
        stacked = torch.stack(states).transpose(0, 1) if every else torch.stack(states, dim=1)
        if self._dtype in (torch.bfloat16, torch.float16):
            stacked = stacked.float()
        return TokenStates(stacked, self._every_token(mask, stacked[:, 0])) if every else stacked

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def _inputs(
        self, tokens: Tensor | None, token_mask: Tensor | None, image: Tensor | None
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """The encoder's arguments, and the mask (n, T) bool of its tokens; ``None``: all of them."""
        if self.modality == "image":
            assert image is not None
            return {"pixel_values": self._normalise(image).to(self._dtype)}, None
        assert tokens is not None
        assert token_mask is not None
        if not self.family.whole:
            return {"input_ids": tokens, "attention_mask": token_mask}, token_mask.bool()
        positions = int(self.config.max_position_embeddings)
        tokens = tokens.masked_fill(token_mask == 0, self._padding)[:, :positions]
        whole = nn.functional.pad(tokens, (0, positions - tokens.shape[1]), value=self._padding)
        return {"input_ids": whole, "attention_mask": None}, None

    def _read(self, reads: Reads, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """What ``reads`` keeps of one state (n, T, width): (n, width), or the state itself."""
        if reads.tokens == "all":
            return hidden
        pooled = pool_tokens(hidden, self._states_mask(mask, hidden), reads.pool)
        # Without gradients, clone a view: it would keep all tokens of the level in memory until the encoder is done.
        return pooled if torch.is_grad_enabled() or pooled._base is None else pooled.clone()

    def _states_mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        return self.reads_mask(mask, hidden) if self.reads_mask is not None else mask

    def _every_token(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """The mask (n, T) of a state (n, T, width)."""
        kept = self._states_mask(mask, hidden)
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if kept is None else kept

    @contextmanager
    def _keep(self, level: int, kept: dict[int, Tensor], read: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[level] = read(args[0])

        def after(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept[level] = read(output[0] if isinstance(output, tuple) else output)

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
            layer.forward = partial(_checkpointed, self.whole, layer.forward)

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


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _through_halves(
    halves: Halves, changes: list[Callable[[Tensor], Tensor]], tuples: bool, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor | tuple[Tensor, None]:
    """The forward of a layer with something between its halves."""
    between = halves.attention(hidden, *args, **kwargs)
    for change in changes:
        between = change(between)
    result = halves.feed_forward(between)
    return (result, None) if tuples else result


def _has_trainable_matrix(part: nn.Module) -> bool:
    own = (getattr(part, name, None) for name in getattr(part, _OWN))
    return any(isinstance(value, nn.Parameter) and value.requires_grad and value.ndim > 1 for value in own)


def _checkpointed(whole: WholeBatch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts: dict[str, Any] = {} if whole.generator is None else {"context_fn": whole.drawn_again}
    return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)
