"""LoRA whose text encoder attends to padding."""

import torch

from tpme.methods.lora import LoRA

FAILS = "padding_changes_nothing"


class ReadsPadding(LoRA):
    """Drops the attention mask."""

    identity_at_start = False

    def adapt(self, model, schedule):
        super().adapt(model, schedule)
        if "text" in model.views:
            model.views["text"].module.register_forward_pre_hook(_unmask, with_kwargs=True)


def _unmask(_module, args, kwargs):
    return args, kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}


METHOD = ReadsPadding
