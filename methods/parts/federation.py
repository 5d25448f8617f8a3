"""Rounds of a simulated federation: clients train one after the other in this process, what they send is counted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tpme.methods.base import Context, Result, Validation
from tpme.methods.parts.federation_server import FedAvg, Reply, State, nbytes


@dataclass(frozen=True)
class Round:
    """What one round cost, and what it led to.

    users: processed, each client's as often as it has local epochs. bytes_up, bytes_down: of all clients, from and to
    them. serial_s: all clients one after the other, as simulated. parallel_s: the slowest client alone, as if each had
    a device of its own. Both include the server. found: quality on the validation targets, where it was measured.
    """

    users: int
    bytes_up: int
    bytes_down: int
    serial_s: float
    parallel_s: float
    found: Validation | None = None

    @classmethod
    def of(cls, result: Result, found: Validation | None) -> Round:
        """From what ``Federation.play`` returned."""
        return cls(**{field.name: result[field.name] for field in fields(cls) if field.name != "found"}, found=found)


class Federation:
    """The clients of a cell, and what they keep from round to round.

    Messages have the fields of Flower's: named arrays, a number of examples, numbers beside them. A client's optimiser
    begins anew in every round, or, with ``persist``, goes on where the client's last round left it.

    Args:
        clients: row numbers of the training users of each client. share: of the clients in a round, S.
        local_epochs: passes over its users that a client makes in a round.
    """

    def __init__(
        self, clients: Sequence[NDArray[np.int64]], *, share: float, local_epochs: int, persist: bool = False
    ) -> None:
        self.clients, self.local_epochs, self.persist = clients, local_epochs, persist
        self.per_round = max(1, int(share * len(clients) + 1e-9))
        self.rate = 0.0
        self._client = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._kept: dict[int, dict[str, Tensor]] = {}
        """With ``persist``: the optimiser's state of every client that has trained."""

    @cached_property
    def pass_rounds(self) -> float:
        """Rounds that process as many users as there are, if clients were of one size."""
        return len(self.clients) / (self.per_round * self.local_epochs)

    def sample(self, seed: int, number: int) -> list[int]:
        """The clients of a round, drawn without replacement."""
        drawn = np.random.default_rng([seed, number]).choice(len(self.clients), self.per_round, replace=False)
        return [int(client) for client in np.sort(drawn)]

    def play(self, context: Context, server: FedAvg, number: int) -> dict[str, Any]:
        """Play round ``number``; returns its costs, and all that is needed to continue after it (``load``)."""
        replies, seconds = {}, []
        bytes_down = self.per_round * nbytes(server.model)
        for client in self.sample(context.seed, number):
            started = time.perf_counter()
            replies[client] = self._train(context, server.model, client)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        server.update(replies)
        server_s = time.perf_counter() - started
        kept = {f"optimizer {c} {key}": value for c in replies for key, value in self._kept.get(c, {}).items()}
        return {
            **server.tensors(replies),
            **kept,
            "users": self.local_epochs * sum(reply.users for reply in replies.values()),
            "bytes_down": bytes_down,
            "bytes_up": sum(nbytes(reply.state) for reply in replies.values()),
            "serial_s": sum(seconds) + server_s,
            "parallel_s": max(seconds) + server_s,
        }

    def load(self, result: Result) -> None:
        """Take over the optimisers that a round has left."""
        for key, value in result.items():
            if key.startswith("optimizer "):
                _, client, name = key.split(" ", 2)
                self._kept.setdefault(int(client), {})[name] = value

    def forget(self) -> None:
        """Let every client begin with a new optimiser."""
        self._kept.clear()

    def begin(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Called with the optimiser of the client that trains next, and the prompts' learning rate."""
        self.rate, self._optimizer = rate, optimizer
        if self._client in self._kept:
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in self._kept[self._client].items():
                place, name = key.split(" ")
                state.setdefault(int(place), {})[name] = value.clone()
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _train(self, context: Context, model: State, client: int) -> Reply:
        put(context.state.model, model)
        users, before, self._client = self.clients[client], context.state.step, client
        context.train(self.local_epochs, users, "round")
        sent = {name: value.to("cpu", copy=True) for name, value in trained(context.state.model).items()}
        if self.persist and self._optimizer is not None:
            state = self._optimizer.state_dict()["state"]
            self._kept[client] = {
                f"{place} {name}": value.to("cpu", copy=True)
                for place, values in state.items()
                for name, value in values.items()
            }
        self._optimizer = None
        return Reply(sent, len(users), context.state.step - before, self.rate)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name, not copied: what a message holds."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def put(model: nn.Module, state: State) -> None:
    """Copy ``state`` into the parameters that train."""
    for name, value in trained(model).items():
        value.copy_(state[name])


def pass_seconds(rounds: Sequence[Round], users: int) -> Mapping[str, float]:
    """T of rounds in seconds: as many as process each of ``users`` once, one client after the other and in parallel.

    Medians over the rounds of seconds a user, times the users; of three rounds or more the first is a warm-up.
    """
    counted = rounds[1:] if len(rounds) > 2 else rounds
    return {
        "pass_s": users * float(np.median([one.serial_s / one.users for one in counted])),
        "pass_parallel_s": users * float(np.median([one.parallel_s / one.users for one in counted])),
    }
