"""LoRA in rounds, each of which goes on with what the one before it has left in the model."""

from tpme.methods.lora import LoRA

FAILS = "resuming_changes_nothing"


class LeavesItInTheModel(LoRA):
    """A part returns nothing of what it trained, so an attempt after a crash has lost it."""

    def run(self, context):
        for number in (1, 2):
            context.once("round", f"round {number}", lambda: self._round(context))
        context.validate()

    def _round(self, context):
        context.train(epochs=1, kind="round")
        return {}


METHOD = LeavesItInTheModel
