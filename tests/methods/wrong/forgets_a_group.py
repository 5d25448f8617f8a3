"""LoRA that gives its optimiser no text encoder."""

from tpme.methods.lora import LoRA

FAILS = ("one_learning_rate_each", "trains_through_all_stages")


class ForgetsAGroup(LoRA):
    """Those parameters get gradients and never move."""

    def param_groups(self, model, lr):
        return [group for group in super().param_groups(model, lr) if group["name"] != "text"]


METHOD = ForgetsAGroup
