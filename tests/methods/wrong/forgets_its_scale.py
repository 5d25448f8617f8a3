"""LoRA whose procedure finds another scale, and does not store it."""

from tpme.methods.lora import LoRA

FAILS = "state_round_trip"


class ForgetsItsScale(LoRA):
    """Trains a fork of four times the scale and adopts it."""

    def run(self, context):
        method = LoRA(self.config.model_copy(update={"alpha": 4 * self.config.alpha}))
        context.adopt(context.fork(method, context.seed))
        context.train()


METHOD = ForgetsItsScale
