"""The mask of the tokens that an encoder is running on, for modules inside its layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from tpme.bench.task.view import EncoderView

_NAME = "_tpme_token_mask"


class TokenMask:
    """Which tokens of the encoder's running forward pass are real; its layers get the mask only in attention's form.

    value: (n, T) bool, true for real tokens; ``None`` where all of them are (images, texts without a mask). It stays
    until the next forward pass, because activation checkpointing runs layers again after it.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    @classmethod
    def of(cls, view: EncoderView) -> TokenMask:
        """The mask of this encoder; every call returns the same object, and a deep copy of the encoder has its own."""
        mask: TokenMask | None = getattr(view.module, _NAME, None)
        if mask is None:
            mask = cls()
            setattr(view.module, _NAME, mask)
            view.module.register_forward_pre_hook(partial(_keep, mask), with_kwargs=True)
        return mask


def _keep(mask: TokenMask, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    given = kwargs.get("attention_mask")
    mask.value = None if given is None else given.bool()
