"""LoRA that moves frozen weights after every step, and zeroes a layer before every pass."""

import torch

from tpme.methods.lora import LoRA

FAILS = "frozen_parameters_stay"


class MovesFrozenWeights(LoRA):
    """What moves is neither trained nor stored."""

    def after_step(self, state, context):
        with torch.no_grad():
            for view in state.model.views.values():
                view.module.get_submodule(view.projections("ffn_in")[0]).weight.add_(1e-3)

    def begin_pass(self, name, model):
        with torch.no_grad():
            for view in model.views.values():
                view.module.get_submodule(view.projections("ffn_out")[0]).weight.zero_()


METHOD = MovesFrozenWeights
