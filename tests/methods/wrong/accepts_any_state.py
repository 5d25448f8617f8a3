"""LoRA that loads whatever fits and ignores the rest."""

from tpme.methods.lora import LoRA

FAILS = "state_of_another_structure_is_refused"


class AcceptsAnyState(LoRA):
    """A state of other options would pass for its own."""

    def load_state(self, model, state):
        own = super().state(model)
        super().load_state(model, own | {k: v for k, v in state.items() if k in own and v.shape == own[k].shape})


METHOD = AcceptsAnyState
