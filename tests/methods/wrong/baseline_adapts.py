"""LoRA that calls itself a baseline, and so gets no TPME."""

from tpme.methods.lora import LoRA

FAILS = "encoders_learn_unless_frozen"


class BaselineAdapts(LoRA):
    """A baseline adapts no encoder."""

    baseline = True


METHOD = BaselineAdapts
