"""LoRA that forgets its scale when it merges, which is 1 by default."""

from peft.tuners.lora import LoraLayer

from tpme.methods.lora import LoRA

FAILS = "merging_changes_no_vector"


class WrongMergeScale(LoRA):
    """``W + B A`` instead of ``W + (alpha / r) B A``."""

    def prepare_inference(self, model):
        for module in model.encoders.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] = 1.0
        super().prepare_inference(model)


METHOD = WrongMergeScale
