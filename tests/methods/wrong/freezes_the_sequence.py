"""LoRA that saves training by freezing the sequential encoder, which is the task's."""

from tpme.methods.lora import LoRA

FAILS = "sequential_encoder_is_the_tasks"


class FreezesTheSequence(LoRA):
    """The rows of a matrix would differ in more than their method."""

    def adapt(self, model, schedule):
        super().adapt(model, schedule)
        model.sequence.requires_grad_(False)


METHOD = FreezesTheSequence
