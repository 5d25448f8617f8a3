"""LoRA that starts away from the pretrained weights."""

from torch import nn

from tpme.methods.lora import LoRA

FAILS = "identity_at_start"


class StartsElsewhere(LoRA):
    """B starts at random."""

    def adapt(self, model, schedule):
        super().adapt(model, schedule)
        for name, parameter in model.encoders.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)


METHOD = StartsElsewhere
