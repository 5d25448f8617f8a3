"""What a training does to every parameter, seen from outside: which trained, which a gradient reached, which moved."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Method


class Watch:
    """Watches one training of ``method``; a context manager around it.

    Attributes:
        before: all parameters and buffers before the training, by name.
        trained: names of the parameters that trained at any time.
        reached: those of them with a gradient that was not zero. broken: those with one that was not finite.
        ungrouped: those that no optimiser was given, each with what happened instead.
    """

    def __init__(self, method: Method, model: Recommender) -> None:
        self.method, self.model = method, model
        self.before = {name: value.detach().clone() for name, value in _tensors(model).items()}
        self.trained: set[str] = set()
        self.reached: set[str] = set()
        self.broken: set[str] = set()
        self.ungrouped: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Watch:
        build = self.method.optimizer

        def optimizer(groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
            self._begin_stage(groups)
            return build(groups, fused=fused)

        self._note_trainable()
        self.method.optimizer = optimizer  # type: ignore[method-assign]
        return self

    def __exit__(self, *_error: object) -> None:
        del self.method.optimizer  # the class's again
        self._note_trainable()
        for handle in self._handles:
            handle.remove()
        self.model.zero_grad(set_to_none=True)

    def moved(self) -> set[str]:
        """Names of parameters and buffers that the training changed."""
        now = _tensors(self.model)
        return {
            name
            for name, value in self.before.items()
            if name in now and not (now[name].shape == value.shape and torch.equal(now[name], value))
        }

    def _note_trainable(self) -> dict[str, nn.Parameter]:
        training = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.trained |= training.keys()
        return training

    def _begin_stage(self, groups: list[dict[str, Any]]) -> None:
        training = self._note_trainable()
        listed = [id(parameter) for group in groups for parameter in group["params"]]
        for name, parameter in training.items():
            if listed.count(id(parameter)) != 1:
                self.ungrouped[name] = f"is in {listed.count(id(parameter))} of the optimiser's groups"
            if name not in self.reached:
                hook = partial(self._note_gradient, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _note_gradient(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if not bool(parameter.grad.isfinite().all()):
            self.broken.add(name)
        elif bool(parameter.grad.any()):
            self.reached.add(name)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
