"""LoRA whose state lacks parameters that train."""

from tpme.methods.lora import LoRA

FAILS = "state_round_trip"


class TrainsUnstored(LoRA):
    """Stores all but the heads, and loads what is there."""

    def state(self, model):
        return {name: value for name, value in super().state(model).items() if ".heads." not in name}

    def load_state(self, model, state):
        missing = {name: value for name, value in super().state(model).items() if ".heads." in name}
        super().load_state(model, {**state, **missing})


METHOD = TrainsUnstored
