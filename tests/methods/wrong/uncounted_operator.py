"""LoRA behind an operator without a FLOP formula."""

import torch

from tpme.methods.lora import LoRA

FAILS = "nothing_is_uncounted"


class UncountedOperator(LoRA):
    """Scales the values of every layer by their largest singular value, over itself."""

    def adapt(self, model, schedule):
        super().adapt(model, schedule)
        for view in model.views.values():
            for name in view.projections("value"):
                view.module.get_submodule(name).register_forward_hook(_scale)


def _scale(_module, _args, output):
    largest = torch.linalg.svdvals(output.detach())[..., :1, None]
    return output * (largest / largest)


METHOD = UncountedOperator
