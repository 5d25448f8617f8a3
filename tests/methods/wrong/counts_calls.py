"""LoRA whose layers count their calls: recomputed, they give other activations."""

from functools import partial

from tpme.methods.lora import LoRA

FAILS = "checkpointing_changes_nothing"


class CountsCalls(LoRA):
    """In a training step, the n-th call of a layer is scaled by 1 / n."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = {}

    def adapt(self, model, schedule):
        super().adapt(model, schedule)
        for view in model.views.values():
            for layer, value in enumerate(view.projections("value")):
                hook = partial(_scale, self.calls, f"{view.modality} {layer}")
                view.module.get_submodule(value).register_forward_hook(hook)

    def begin_pass(self, name, model):
        self.calls.update(dict.fromkeys(self.calls, 0))


def _scale(calls, key, module, _args, output):
    if not module.training:
        return output
    calls[key] = calls.get(key, 0) + 1
    return output / calls[key]


METHOD = CountsCalls
