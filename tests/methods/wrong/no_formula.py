"""LoRA without a parameter formula."""

from tpme.methods.base import Method
from tpme.methods.lora import LoRA

FAILS = "parameter_formula"


class NoFormula(LoRA):
    """Inherits that of the base class, which is none."""

    trainable_parameters = Method.trainable_parameters


METHOD = NoFormula
