"""Calls itself decoupled and alters the encoders."""

import torch

from tpme.methods.base import Method, fusion_parameters

FAILS = ("encoders_learn_unless_frozen", "cached_equals_uncached", "cache_key_names_what_is_read")


class DecoupledAltersEncoders(Method):
    """Shifts a bias of every encoder: on cached states it is another method."""

    decoupled = True
    identity_at_start = False

    def adapt(self, model, schedule):
        with torch.no_grad():
            for view in model.views.values():
                view.module.get_submodule(view.projections("ffn_out")[-1]).bias[0].add_(0.5)

    def trainable_parameters(self, task, views):
        return fusion_parameters(task)


METHOD = DecoupledAltersEncoders
