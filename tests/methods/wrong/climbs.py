"""LoRA that climbs."""

from tpme.methods.lora import LoRA

FAILS = "loss_falls"


class Climbs(LoRA):
    """Maximises the task's loss."""

    def losses(self, outputs):
        return {name: -output.loss for name, output in outputs.items()}


METHOD = Climbs
