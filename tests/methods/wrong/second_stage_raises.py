"""LoRA whose second stage raises."""

from tpme.methods.base import Stage
from tpme.methods.lora import LoRA

FAILS = "trains_through_all_stages"


class SecondStageRaises(LoRA):
    """Its first stage is fine."""

    def stages(self):
        return Stage("first", 0.5), Stage("second", 0.5)

    def begin_stage(self, state):
        if state.stage.name == "second":
            raise RuntimeError("the second stage was never tried")


METHOD = SecondStageRaises
