"""LoRA whose prepared model runs every layer ten times."""

from functools import partial

from tpme.methods.lora import LoRA

FAILS = "inference_is_not_dearer"


class DearInference(LoRA):
    """The vectors stay the same."""

    def prepare_inference(self, model):
        super().prepare_inference(model)
        for view in model.views.values():
            for layer in view.layers:
                layer.forward = partial(_ten_times, layer.forward)


def _ten_times(forward, *args, **kwargs):
    return [forward(*args, **kwargs) for _ in range(10)][-1]


METHOD = DearInference
