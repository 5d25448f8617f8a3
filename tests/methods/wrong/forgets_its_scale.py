"""LoRA that changes its scale before training, and does not store it."""

from peft.tuners.lora import LoraLayer

from tpme.methods.lora import LoRA

FAILS = "state_round_trip"


class ForgetsItsScale(LoRA):
    """Multiplies the scale by four in the modules, where no fresh model finds it."""

    def before_training(self, context):
        for module in context.state.model.encoders.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: 4 * scale for name, scale in module.scaling.items()}


METHOD = ForgetsItsScale
