"""``shard = true``: weights, gradients and optimiser states of the encoders are spread over the ranks (FSDP2).

A layer's weights are gathered when it runs, forward and backward, and freed after it; its gradients are averaged over
the ranks where they are split. Item encoder and sequential encoder stay whole on each rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tpme.bench.task.recommender import Recommender
from tpme.bench.train.ranks import Ranks


def shard(model: Recommender, ranks: Ranks) -> None:
    """Spread the encoders of an adapted model over the ranks, layer by layer, and move them to their devices.

    The model is on the host; a device never holds more than one whole layer.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for view in model.views.values():
        for part in (*view.layers, view.module):
            # Also the outermost part is freed after its forward pass: its parameters are then those of the optimiser.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def unshard(model: Recommender) -> None:
    """Make every sharded parameter whole again, on the host of each rank, and forget how it was spread."""
    from torch.distributed.fsdp import FSDPModule

    wholes: dict[nn.Parameter, nn.Parameter] = {}  # modules may share a parameter
    for module in model.encoders.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if is_sharded(value):
                if value not in wholes:
                    wholes[value] = nn.Parameter(whole_tensor(value).cpu(), requires_grad=value.requires_grad)
                setattr(module, name, wholes[value])
    for module in model.encoders.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                handle.remove()
            module.__class__ = type(module).__bases__[1]  # fully_shard derives a class from it


def is_sharded(value: Any) -> bool:
    """Whether this rank holds a part of it; without an import of DTensor, which one device does not need."""
    return hasattr(value, "full_tensor")


def own_part(value: Any) -> Tensor:
    """The part of a sharded tensor that is on this rank; any other as it is."""
    part: Tensor = value.to_local() if is_sharded(value) else value
    return part


def whole_tensor(value: Any) -> Tensor:
    """``value``; gathered from all ranks where it is sharded, so all of them must call it."""
    whole: Tensor = value.full_tensor() if is_sharded(value) else value
    return whole


def split_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimiser's groups, with sharded and whole parameters apart: one kernel cannot update both."""
    apart = []
    for group in groups:
        for sharded in (False, True):
            parameters = [value for value in group["params"] if is_sharded(value) == sharded]
            if parameters:
                apart.append(group | {"params": parameters})
    return apart
