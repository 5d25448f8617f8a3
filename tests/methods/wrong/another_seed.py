"""LoRA with a generator of its own that nobody seeds."""

import secrets

import torch

from tpme.methods.lora import LoRA

FAILS = "training_is_reproducible"


class AnotherSeed(LoRA):
    """Shakes the gradients a little."""

    def after_backward(self, state):
        noise = torch.Generator().manual_seed(secrets.randbits(60))
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn(parameter.shape, generator=noise), alpha=0.01)


METHOD = AnotherSeed
