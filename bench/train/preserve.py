"""Further training steps without side effects: everything they may change is restored in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tpme.bench.train.build import separate_generators
from tpme.bench.train.loop import Trainer
from tpme.bench.train.sharding import own_part


@contextmanager
def preserved(trainer: Trainer) -> Iterator[None]:
    """Restore model, method, training state and random generators after the block.

    Values are copied to the host and written back into the same tensors, so that recorded CUDA graphs stay valid. Not
    restored is what a method keeps deeper than in the lists and dicts that are its attributes, modules excepted.
    """
    own: list[Any] = tree_leaves(vars(trainer.method))
    roots = [trainer.model, *(part for part in own if isinstance(part, nn.Module))]
    parts = dict.fromkeys(part for root in roots for part in root.modules())
    holders = [_Holder(part) for part in (*parts, trainer.method, trainer.state, trainer.outcome)]
    values = [_Values(tensor) for tensor in _tensors(holders)]
    stateful: list[Any] = [trainer.scaler, *(part for part in own if isinstance(part, torch.optim.Optimizer))]
    states = [copy.deepcopy(one.state_dict()) for one in stateful]
    try:
        with separate_generators("steps after training", trainer.device):
            yield
    finally:
        for holder in holders:
            holder.restore()
        for value in values:
            value.restore()
        for one, state in zip(stateful, states, strict=True):
            one.load_state_dict(state)


class _Holder:
    """The attributes of an object; of those that are lists or dicts also what is in them."""

    def __init__(self, of: object) -> None:
        self.of, self.attributes = of, dict(vars(of))
        self.contents = [(own, copy.copy(own)) for own in self.attributes.values() if isinstance(own, dict | list)]

    def restore(self) -> None:
        """Put attributes and contents back."""
        vars(self.of).clear()
        vars(self.of).update(self.attributes)
        for own, content in self.contents:
            own.clear()
            own.update(content) if isinstance(own, dict) else own.extend(content)


class _Values:
    """What is restored of a tensor: values (copied to the host), storage, gradient and ``requires_grad``."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data, self.grad = tensor, tensor.data, tensor.grad if tensor.is_leaf else None
        self.host, self.trains = own_part(tensor.detach()).to("cpu", copy=True), tensor.requires_grad

    def restore(self) -> None:
        """Write the values back."""
        own_part(self.data).copy_(self.host)
        self.tensor.data = self.data
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.trains).grad = self.grad


def _tensors(holders: Iterable[_Holder]) -> list[Tensor]:
    found: list[Any] = [leaf for holder in holders for leaf in tree_leaves(holder.attributes)]
    return list({id(leaf): leaf for leaf in found if isinstance(leaf, Tensor)}.values())
