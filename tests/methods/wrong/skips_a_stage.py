"""LoRA with a procedure that leaves out the second stage."""

from tpme.methods.base import Stage
from tpme.methods.lora import LoRA

FAILS = "trains_through_all_stages"


class SkipsAStage(LoRA):
    """Tells the trainer of one stage only."""

    def stages(self):
        return Stage("first", 0.5), Stage("second", 0.5)

    def run(self, context):
        self.stages = lambda: (Stage("first"),)
        context.train()
        del self.stages


METHOD = SkipsAStage
