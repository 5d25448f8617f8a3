"""Adapters first, the norms with them in a second stage; every step has two passes, whose logits should agree."""

from torch.nn import functional

from tpme.methods.adapter import HoulsbyAdapter
from tpme.methods.base import Stage


class TwoStagesTwoPasses(HoulsbyAdapter):
    """R-Drop (Liang et al., NeurIPS 2021) over adapters, then over the norms as well."""

    def stages(self):
        return Stage("adapters", 0.5), Stage("norms", 0.5)

    def begin_stage(self, state):
        if state.stage.name == "norms":
            for view in state.model.views.values():
                for layer in range(view.shape.depth):
                    for norm in view.norms(layer):
                        norm.requires_grad_(True)

    def trainable_parameters(self, task, views):
        """In the last stage: scale and, except of an RMSNorm, shift of two norms a layer."""
        norms = [norm for view in views.values() for layer in range(view.shape.depth) for norm in view.norms(layer)]
        norms = sum(value.numel() for norm in norms for value in norm.parameters())
        return super().trainable_parameters(task, views) + norms

    def passes(self):
        return "first", "second"

    def losses(self, outputs):
        first, second = (output.logits.log_softmax(dim=1) for output in outputs.values())
        agree = functional.kl_div(first, second, log_target=True, reduction="batchmean")
        return super().losses(outputs) | {"agree": agree}


METHOD = TwoStagesTwoPasses
