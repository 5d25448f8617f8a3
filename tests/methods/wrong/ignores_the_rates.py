"""LoRA at a learning rate of its own, whatever the matrix says."""

from tpme.methods.lora import LoRA

FAILS = "one_learning_rate_each"


class IgnoresTheRates(LoRA):
    """A search over learning rates would find them all the same."""

    def param_groups(self, model, lr):
        return [group | {"lr": 0.01} for group in super().param_groups(model, lr)]


METHOD = IgnoresTheRates
