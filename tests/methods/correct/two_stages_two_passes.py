"""Adapters first, the norms with them in a second stage; every step has two passes, whose logits should agree."""

from torch import nn
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
                for part in view.layers:
                    for module in part.modules():
                        if isinstance(module, nn.LayerNorm):
                            module.requires_grad_(True)

    def passes(self):
        return "first", "second"

    def losses(self, outputs):
        first, second = (output.logits.log_softmax(dim=1) for output in outputs.values())
        agree = functional.kl_div(first, second, log_target=True, reduction="batchmean")
        return super().losses(outputs) | {"agree": agree}

    def state(self, model):
        return super().state(model) | {name: value for name, value in model.named_parameters() if _is_norm(model, name)}

    def load_state(self, model, state):
        for name, parameter in model.named_parameters():
            if _is_norm(model, name):
                parameter.requires_grad_(True)
        super().load_state(model, state)


def _is_norm(model, name):
    return name.startswith("encoders.") and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)


METHOD = TwoStagesTwoPasses
