"""Tokens that a method inserts into an encoder, after token 0.

They are inserted after the embeddings, so the positions that embeddings add to an item's own tokens stay as they are.
They are never read: pooling leaves them out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.task.view import EncoderView


class Inserted(Protocol):
    """What is inserted into each item: ``length`` tokens in the running forward pass."""

    @property
    def length(self) -> int:
        """P, the number of tokens."""

    def insert(self, hidden: Tensor) -> Tensor:
        """Map hidden state 0, (n, N, D), to (n, N+P, D): P tokens after token 0."""


def insert_tokens(view: EncoderView, inserted: Inserted, method: str) -> None:
    """Insert the tokens of ``inserted`` into every item, in every forward pass of an encoder.

    Args:
        view: the encoder. inserted: a deep copy of the model must run its own copy of it, so it holds no closure.
        method: its name, for the error.

    Raises UserError for an encoder that counts positions from the token ids after its embeddings.
    """
    if not view.family.prompts:
        raise UserError(
            f"method '{method}': {type(view.module).__name__} counts positions from the token ids, so no tokens can be "
            "inserted after them; choose another encoder"
        )
    # Partials, not closures: a deep copy of the model then runs its own copy of what is inserted.
    view.module.register_forward_pre_hook(partial(_extend_mask, inserted), with_kwargs=True)
    view.reads_mask = partial(_item_tokens, inserted)
    view.embeddings.register_forward_hook(partial(_insert, inserted))


def _extend_mask(
    inserted: Inserted, _module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    if mask is not None:  # token 0 is never padding, so its column serves the inserted tokens too
        kwargs["attention_mask"] = torch.cat([mask[:, :1].expand(-1, inserted.length), mask], dim=1)
    return args, kwargs


def _item_tokens(inserted: Inserted, mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask (n, N+P) of a state: that of the item's tokens, without the inserted ones."""
    if mask is None:
        mask = torch.ones(len(hidden), hidden.shape[1] - inserted.length, dtype=torch.bool, device=hidden.device)
    return torch.cat([mask[:, :1], mask.new_zeros(len(mask), inserted.length), mask[:, 1:]], dim=1)


def _insert(inserted: Inserted, _module: nn.Module, _args: object, hidden: Tensor) -> Tensor:
    return inserted.insert(hidden)
