"""The server of a simulated federation: FedAvg, and FedPepTAO's momentum step with control variates.

All tensors are on the host. Sums run in float64 and are rounded to float32 once, so that FedAvg is the special case
without a server step to the last bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""Float32 tensors by name."""
DECAY, FLOOR = 0.99, 0.002
"""Of the server's step: its factor a round, and its least share of the first (published: 1e-4 of 0.05)."""


@dataclass(frozen=True)
class Reply:
    """What a client sends back: its state, its number of users, and its local steps at which learning rate."""

    state: State
    users: int
    steps: int
    rate: float


def nbytes(state: State) -> int:
    """Bytes of a message with this state."""
    return sum(value.numel() * value.element_size() for value in state.values())


def weights_of(replies: Mapping[int, Reply]) -> dict[int, float]:
    """Share of every client among the users of this round."""
    total = sum(reply.users for reply in replies.values())
    return {client: reply.users / total for client, reply in replies.items()}


def mean_state(replies: Mapping[int, Reply]) -> dict[str, Tensor]:
    """``sum_k w_k P_k`` in float64, w_k the share of the users."""
    weights = weights_of(replies)
    names = next(iter(replies.values())).state
    return {
        name: torch.stack([w * replies[client].state[name].double() for client, w in weights.items()]).sum(dim=0)
        for name in names
    }


class FedAvg:
    """``P <- sum_k w_k P_k`` (McMahan et al., AISTATS 2017)."""

    def __init__(self, model: State) -> None:
        self.model = dict(model)

    def update(self, replies: Mapping[int, Reply]) -> None:
        """One round."""
        self.model = {name: value.float() for name, value in mean_state(replies).items()}

    def tensors(self, _changed: Mapping[int, Reply]) -> dict[str, Tensor]:
        """All that a round has changed, by name, for ``load``."""
        return {f"model {name}": value for name, value in self.model.items()}

    def load(self, tensors: State) -> None:
        """Take over what a round has left."""
        self.model = _part(tensors, "model ")


@dataclass
class Drift:
    """The server's memory besides the model: momentum v, control variates c and c_k, the last Delta, and eta_s."""

    momentum: dict[str, Tensor]
    control: dict[str, Tensor]
    rate: float
    of_client: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    previous: dict[str, Tensor] = field(default_factory=dict)


class FedPepTAOServer(FedAvg):
    """FedAvg of everything, and a momentum step on the prompts, corrected by control variates.

    With ``Delta = P - sum_k w_k P_k``, tau_k local steps and the nominal client rate eta::

        c_k' = c_k - c + (P - P_k) / (tau_k eta),   c <- c + S sum_k tau_k (c_k' - c_k) / sum_k tau_k
        u_k = m v + (1 - m) (Delta_before - Delta) + (c - c_k'),   v <- sum_k w_k u_k
        P <- sum_k w_k P_k - eta_s v,  eta_s = r tau eta   from the second round on

    The server derives c and c_k itself, so they cost no traffic. Every client's u_k starts from the v before the round.

    tau is the mean of tau_k: a client moves a prompt by about tau eta, and (c - c_k) is a move by one step. While c
    and c_k start from 0, their difference does not cancel but points back, and v sums it up ten times (m = 0.9). A
    fixed eta_s (published: 0.05 where eta is 0.04) then undoes what clients of a few local steps have done.

    Args:
        model: the state at the start. prompts: names of the prompts in it. rate: r. momentum: m.
        share: S, of the clients in a round.
    """

    def __init__(self, model: State, prompts: Collection[str], *, rate: float, momentum: float, share: float) -> None:
        super().__init__(model)
        self.prompts, self.keep, self.share, self.floor = list(prompts), momentum, share, FLOOR * rate
        self.drift = Drift(self._zeros(), self._zeros(), rate)

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self.model[name]) for name in self.prompts}

    def update(self, replies: Mapping[int, Reply]) -> None:
        """One round."""
        before, drift, mean, weights = self.model, self.drift, mean_state(replies), weights_of(replies)
        super().update(replies)
        moves = bool(drift.previous)
        if moves:
            drift.rate = max(DECAY * drift.rate, self.floor)
        eta = next(iter(replies.values())).rate
        steps = sum(reply.steps for reply in replies.values())
        for name in self.prompts:
            own = {client: drift.of_client.setdefault(client, self._zeros()) for client in replies}
            start, control = before[name].double(), drift.control[name].double()
            new = {
                client: own[client][name].double()
                - control
                + (start - reply.state[name].double()) / (reply.steps * eta)
                for client, reply in replies.items()
            }
            change = sum(reply.steps * (new[k] - own[k][name].double()) for k, reply in replies.items()) / steps
            control = control + self.share * change
            delta = start - mean[name]
            if moves:
                turn = (1 - self.keep) * (drift.previous[name].double() - delta)
                carried = self.keep * drift.momentum[name].double() + turn
                momentum = sum(w * (carried + control - new[client]) for client, w in weights.items())
                self.model[name] = (mean[name] - drift.rate * steps / len(replies) * eta * momentum).float()
                drift.momentum[name] = torch.as_tensor(momentum).float()
            drift.control[name] = torch.as_tensor(control).float()
            for client in replies:
                own[client][name] = new[client].float()
            drift.previous[name] = delta.float()

    def tensors(self, changed: Mapping[int, Reply]) -> dict[str, Tensor]:
        """The model, momentum, controls and last Delta after a round, and the controls of its clients."""
        drift = self.drift
        own = {f"{client} {name}": value for client in changed for name, value in drift.of_client[client].items()}
        parts = {"momentum": drift.momentum, "control": drift.control, "previous": drift.previous, "client": own}
        named = {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}
        return super().tensors(changed) | named | {"rate": torch.tensor(drift.rate, dtype=torch.float64)}

    def load(self, tensors: State) -> None:
        """Take over what a round has left."""
        super().load(tensors)
        drift = self.drift
        drift.momentum, drift.control = _part(tensors, "momentum "), _part(tensors, "control ")
        drift.previous, drift.rate = _part(tensors, "previous "), float(tensors["rate"])
        for key, value in _part(tensors, "client ").items():
            client, _, name = key.partition(" ")
            drift.of_client.setdefault(int(client), self._zeros())[name] = value


def _part(tensors: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
