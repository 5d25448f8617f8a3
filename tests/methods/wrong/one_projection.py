"""LoRA that forgets the value projections."""

from peft import LoraConfig, inject_adapter_in_model

from tpme.methods.lora import LoRA

FAILS = "parameter_formula"


class OneProjection(LoRA):
    """Adapts the queries, whatever ``targets`` says."""

    def adapt(self, model, schedule):
        for view in model.views.values():
            rank, alpha = self.config.rank, self.config.alpha
            settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=view.projections("query"))
            inject_adapter_in_model(settings, view.module)


METHOD = OneProjection
