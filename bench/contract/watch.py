"""Watches a training from outside: which parameters trained, which a gradient reached, which changed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpme.bench.task.recommender import Recommender
from tpme.bench.train.epochs import EpochLoop
from tpme.bench.train.loop import Trainer


class Watch:
    """Watches one training, that of forks included; a context manager around ``trainer.run()``.

    Attributes:
        trained: names of the parameters that trained at any time. The first model of a search may never train.
        reached: those of them with a gradient that was not zero. broken: those with one that was not finite.
        ungrouped: those that were not in one group of an optimiser, with the number of groups that they were in.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._before = {name: value.detach().clone() for name, value in _tensors(trainer.model).items()}
        self.trained: set[str] = set()
        self.reached: set[str] = set()
        self.broken: set[str] = set()
        self.ungrouped: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Watch:
        self._build = build = EpochLoop.optimizer

        def optimizer(loop: EpochLoop) -> torch.optim.Optimizer:
            built = build(loop)
            self._watch_gradients(loop.model, built)
            return built

        # Every trainer's, because a method's procedure may fork its own.
        EpochLoop.optimizer = optimizer  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_error: object) -> None:
        EpochLoop.optimizer = self._build  # type: ignore[method-assign]
        self._note_trainable(self._trainer.model)
        for handle in self._handles:
            handle.remove()
        self._trainer.model.zero_grad(set_to_none=True)

    def moved(self) -> set[str]:
        """Names of parameters and buffers that the training changed.

        Not of those that it cut to another shape: that their values follow from state(), its round trip shows.
        """
        now = _tensors(self._trainer.model)
        kept = {name: value for name, value in self._before.items() if name in now and now[name].shape == value.shape}
        return {name for name, value in kept.items() if not torch.equal(now[name], value)}

    def _note_trainable(self, model: Recommender) -> dict[str, nn.Parameter]:
        training = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.trained |= training.keys()
        return training

    def _watch_gradients(self, model: Recommender, optimizer: torch.optim.Optimizer) -> None:
        grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        for name, parameter in self._note_trainable(model).items():
            if grouped.count(id(parameter)) != 1:
                self.ungrouped[name] = grouped.count(id(parameter))
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
