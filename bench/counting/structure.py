"""The structure of a trained model: a deep copy on the ``meta`` device, without a second copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpme.bench.train.loop import Trainer
from tpme.methods.base import Method, StepState

META = torch.device("meta")


def structure_of(trainer: Trainer) -> tuple[Method, StepState]:
    """Copies of the method and of the state of its last step, with the model, all tensors on ``meta``.

    Method and model are copied together, so modules that the method keeps for itself are those of the copied model.
    """
    state = trainer.state
    with _ValuesLeftOut():
        method, model = copy.deepcopy((trainer.method, trainer.model))
    model.zero_grad(set_to_none=True)
    return method, replace(state, model=model, step=max(0, state.step - 1))


class _ValuesLeftOut(TorchFunctionMode):
    """Deep copies of tensors are on ``meta``: same shapes, strides and types."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, unless it copies a tensor."""
        if func is Tensor.clone:  # of a Parameter
            return _on_meta(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _on_meta(tensor).requires_grad_(tensor.requires_grad and tensor.is_leaf)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
