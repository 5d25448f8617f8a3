"""What lies below the first trained parameter is not differentiated."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from torch import Tensor, nn

BY_MODULES = ("fft", "bitfit", "lora", "adapter", "pfeiffer-adapter", "ln-tuning")
"""Methods whose parameters all belong to modules that run, so that the order of modules shows where training begins."""


@pytest.mark.parametrize("name", BY_MODULES)
@pytest.mark.parametrize("modality", ["text", "image"])
def test_nothing_below_the_first_trained_parameter_is_differentiated(
    name: str, modality: Any, tiny: ModuleType
) -> None:
    _, model = tiny.build(name)
    model.train()
    ran: list[tuple[bool, bool]] = []

    def note(module: nn.Module, _args: object, output: object) -> None:
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(output, Tensor):
            ran.append((trains, output.requires_grad))

    leaves = [module for module in model.encoders[modality].modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(note) for leaf in leaves]
    model.states(modality, tiny.items()).sum().backward()
    for handle in handles:
        handle.remove()
    first = [trains for trains, _ in ran].index(True)
    assert not any(differentiated for _, differentiated in ran[:first])
    assert all(differentiated for trains, differentiated in ran[first:] if trains)
    assert first > 0 or name in ("fft", "bitfit"), "the embeddings stay"
