"""LoRA that holds on to the outputs of every step, and so to their graphs: memory grows until none is left."""

from tpme.methods.lora import LoRA

FAILS = "evaluation_repeats"


class KeepsTheGraph(LoRA):
    """It would also fail where the harness copies the trained model."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def losses(self, outputs):
        self.seen.append(outputs)
        return super().losses(outputs)


METHOD = KeepsTheGraph
