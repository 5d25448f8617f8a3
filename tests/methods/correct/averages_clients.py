"""LoRA by federated averaging (McMahan et al., AISTATS 2017): rounds over two halves of the users."""

import torch

from tpme.methods.lora import LoRA


class AveragesClients(LoRA):
    """Every round trains one client after the other from the same state, and averages what they trained."""

    def run(self, context):
        clients = context.users[::2], context.users[1::2]
        for number in (1, 2):
            average = context.once("round", f"round {number}", lambda: self._round(context, clients))
            self.load_state(context.state.model, average)
        context.validate()

    def _round(self, context, clients):
        model, states = context.state.model, []
        start = {name: value.clone() for name, value in self.state(model).items()}
        for users in clients:
            self.load_state(model, start)
            context.train(epochs=1, users=users, kind="round")
            states.append({name: value.clone() for name, value in self.state(model).items()})
        return {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in start}


METHOD = AveragesClients
