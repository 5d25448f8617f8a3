"""LoRA in the text encoder alone; the image encoder stays as it is, and its states may be cached."""

from tpme.methods.lora import LoRA


class TextOnly(LoRA):
    """Which encoder stays frozen is said by ``frozen_encoders``; the formula leaves it out."""

    def frozen_encoders(self, modalities):
        return tuple(modality for modality in modalities if modality == "image")

    def adapt(self, model, schedule):
        views, model.views = model.views, {m: view for m, view in model.views.items() if m == "text"}
        super().adapt(model, schedule)
        model.views = views

    def trainable_parameters(self, task, views):
        return super().trainable_parameters(task, {m: view for m, view in views.items() if m == "text"})


METHOD = TextOnly
