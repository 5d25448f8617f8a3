"""FedPepTAO (Che et al., EMNLP 2023): deep prompts in a part of the layers, trained by simulated federated rounds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.batches import Batch
from tpme.bench.task.loss import in_batch_loss
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Context, Method, MethodConfig, Result, Schedule, StepState, TaskShape, fusion_parameters
from tpme.methods.parts.attention import extend_attention
from tpme.methods.parts.federation import Federation, Round, pass_seconds, put, trained
from tpme.methods.parts.federation_clients import FEWEST, dirichlet_clients, iid_clients, user_clusters
from tpme.methods.parts.federation_estimate import federated_scores, final_states
from tpme.methods.parts.federation_layers import best_layers, hessian_ratios, kept
from tpme.methods.parts.federation_server import FedAvg, FedPepTAOServer, nbytes
from tpme.methods.parts.partial_prefix import PartialPrefix, partial_prefixes, prepend_chosen, without_prompts

PROMPT = ".prefix.layers."
"""In the names of all prompts."""
CLIENTS, USERS_A_CLIENT = 100, 10
"""As many clients as published, where the data set has this many users for each."""
ESTIMATE_SHARE = 0.1
"""Rounds with prompts in all layers before the Hessian is read, of all rounds: published are 10 and 100."""
Share = Annotated[float, Field(gt=0, le=1)]


class FedPepTAOConfig(MethodConfig):
    """Prompts, layers, clients, rounds and server; the defaults are the published values, where there is one.

    length: keys and values a layer, P. dropout: of them. layer_ratio: share of the layers that carry prompts, in each
    encoder. ratio_from: that option, or the spectrum of the prompts' Hessian, found before training. clients: by
    default 100, or as many as have ten users each. sample: share of the clients in a round, at least one. local_epochs:
    passes of a client over its users in a round. rounds: by default as many as process the users as often as the task
    has epochs. partition: clients that prefer different clusters of items, or equal ones. alpha: of the Dirichlet
    prior; small values give one-sided clients. clusters: of the items. algorithm: of the server; ``fedavg`` averages
    and does no more. server_rate: the server's step, as a share of what a client's local steps move (published: 0.05 at
    a learning rate of 0.04, which is this share of 25 steps). momentum: of the server. weight_decay, clip_norm: of the
    prompts; no clipping where it is null. client_optimizer: AdamW begins anew in every round (paper), or goes on with
    the client's moments (published code).
    """

    length: PositiveInt = 20
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    layer_ratio: Share = 0.5
    ratio_from: Literal["option", "spectrum"] = "option"
    clients: PositiveInt | None = None
    sample: Share = 0.1
    local_epochs: PositiveInt = 2
    rounds: PositiveInt | None = None
    partition: Literal["dirichlet", "iid"] = "dirichlet"
    alpha: PositiveFloat = 1.0
    clusters: PositiveInt = 8
    algorithm: Literal["fedpeptao", "fedavg"] = "fedpeptao"
    server_rate: NonNegativeFloat = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat | None = 1.0
    client_optimizer: Literal["reset", "persist"] = "reset"


class FedPepTAO(Method):
    """Trains deep prompts in the most useful layers by simulated federated rounds, with momentum and drift control on
    the server.

    ``P <- sum_k w_k P_k - eta_s v, v <- m v + (1 - m)(D' - D) + sum_k w_k (c - c_k)``: P_k are the keys and values that
    client k returns, w_k its share of the users, D the change of a round and D' of the one before, c and c_k control
    variates that the server derives itself. Clients are disjoint sets of users in one process. In a round, a part of
    them trains the global prompts for some epochs, with AdamW, one client after the other. Layers are ranked by how
    alike the frozen encoder's states of different items are after them (``federation_layers``); the share that carries
    prompts is an option, or read off the Hessian. Fusion, heads and sequential encoder start at random, so they train
    and travel too; they are averaged (FedAvg), and their bytes are reported beside the prompts'.

    Clients of ``dirichlet`` prefer different clusters (k-means) of the items, by the frozen text states. With
    ``algorithm = "fedavg"`` or ``server_rate = 0`` the server averages alone. Reconstruction: eta_s scales with the
    learning rate and the local steps, else the server undoes the work of clients of few steps; momentum starts from the
    same v for every client (the published code lets it compound); the loss's popularity correction counts all users, as
    the task does; prompts are global, so the catalogue is encoded once; there is no early stopping, and validation
    comes once a pass.

    Trains: keys and values of half the layers (P = 20): 184,320 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state, stored size, and the bytes that clients and server exchange; every
    prompted layer attends to P more keys, in training and at inference; a simulation is not faster.
    Source: Che et al., Federated Learning of Large Language Models with Parameter-Efficient Prompt Tuning and
    Adaptive Optimization, EMNLP 2023; FedAvg: McMahan et al., AISTATS 2017.
    """

    Config = FedPepTAOConfig
    config: FedPepTAOConfig
    identity_at_start = False
    groups = ("prompt",)

    def __init__(self, config: FedPepTAOConfig) -> None:
        super().__init__(config)
        self.rounds: list[Round] = []
        self._federation: Federation | None = None
        self._estimated: Result = {}
        self._users = 0

    # --- structure ----------------------------------------------------------------------------------------------

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Extend the attention of every layer. Raises UserError where an encoder computes it in another way."""
        for view in model.views.values():
            prefix = PartialPrefix(view, self.config.length, self._kept(view), self.config.dropout)
            view.module.add_module("prefix", prefix)
            for layer in range(view.shape.depth):
                # A partial, not a closure: a deep copy of the model then runs its own copy of the prefix.
                extend_attention(view, layer, partial(prepend_chosen, prefix, layer))

    def _kept(self, view: EncoderView) -> int:
        spectrum = self.config.ratio_from == "spectrum"
        return kept(1.0 if spectrum else self.config.layer_ratio, view.shape.depth)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """``K P 2 H_kv d_h`` an encoder, K = ratio L; with ``spectrum`` all layers, of which training drops some."""
        prompts = [
            self._kept(view) * self.config.length * 2 * view.heads.key_value * view.heads.width
            for view in views.values()
        ]
        return sum(prompts) + fusion_parameters(task)

    # --- a client's training ------------------------------------------------------------------------------------

    def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """AdamW, whose weight decay is that of the prompts alone."""
        decayed = [{"weight_decay": self.config.weight_decay} if g["name"] == "prompt" else {} for g in groups]
        optimizer = torch.optim.AdamW(
            [one | decay for one, decay in zip(groups, decayed, strict=True)], weight_decay=0.0, fused=fused
        )
        if self._federation is not None:
            self._federation.begin(optimizer, next(g["lr"] for g in groups if g["name"] == "prompt"))
        return optimizer

    def after_backward(self, state: StepState) -> None:
        """Clip the norm of the prompts' gradients."""
        if self.config.clip_norm is not None:
            prompts = [value for prefix in partial_prefixes(state.model).values() for value in prefix.parameters()]
            nn.utils.clip_grad_norm_(prompts, self.config.clip_norm)

    # --- the procedure ------------------------------------------------------------------------------------------

    def check_run(self, users: int) -> None:
        """Raise UserError where there are too few training users for so many clients."""
        if FEWEST * (self.config.clients or 1) > users:
            raise UserError(
                f"method 'fedpeptao': clients = {self.config.clients or 1}, but there are only {users} training users, "
                f"and a client needs {FEWEST} (one alone has no negatives); choose at most {users // FEWEST} clients"
            )

    def before_training(self, context: Context) -> None:
        """Divide the users among the clients, and choose the layers."""
        self.check_run(len(context.users))
        self._users = len(context.users)
        found = context.once("estimate", "clients", lambda: {"of_user": torch.from_numpy(self._partition(context))})
        of_user = found["of_user"].numpy()
        self._federation = Federation(
            [context.users[of_user == client] for client in range(of_user.max() + 1)],
            share=self.config.sample,
            local_epochs=self.config.local_epochs,
            persist=self.config.client_optimizer == "persist",
        )
        self._estimated = context.once("estimate", "layers", partial(self._choose_layers, context, self._federation))
        for modality, prefix in partial_prefixes(context.state.model).items():
            prefix.choose(self._estimated["layers"][modality])

    def run(self, context: Context) -> None:
        """Play all rounds; validate once a pass over the users, and after the last round."""
        federation, model = self._federation, context.state.model
        assert federation is not None
        number, every = self._round_number(context, federation), max(1, round(federation.pass_rounds))
        server = self._server(model, federation)
        self.rounds = []
        for index in range(1, number + 1):
            result = context.once("round", f"round {index}", partial(federation.play, context, server, index))
            server.load({key: value for key, value in result.items() if isinstance(value, Tensor)})
            federation.load(result)
            put(model, server.model)
            found = context.validate() if index % every == 0 or index == number else None
            self.rounds.append(Round.of(result, found))
        self._federation = None

    def _round_number(self, context: Context, federation: Federation) -> int:
        return self.config.rounds or max(1, round(context.state.schedule.epochs * federation.pass_rounds))

    def _server(self, model: Recommender, federation: Federation) -> FedAvg:
        start = {name: value.to("cpu", copy=True) for name, value in trained(model).items()}
        if self.config.algorithm == "fedavg":
            return FedAvg(start)
        return FedPepTAOServer(
            start,
            [name for name in start if PROMPT in name],
            rate=self.config.server_rate,
            momentum=self.config.momentum,
            share=federation.per_round / len(federation.clients),
        )

    # --- before training ----------------------------------------------------------------------------------------

    def _partition(self, context: Context) -> np.ndarray:
        """The client of every user, (users,)."""
        users = len(context.users)
        clients = self.config.clients or max(1, min(CLIENTS, users // USERS_A_CLIENT))
        rng = np.random.default_rng([context.seed, clients])
        if self.config.partition == "iid":
            return iid_clients(users, clients, rng)
        model = context.state.model.eval()
        modality: Modality = "text" if "text" in model.views else "image"
        with without_prompts(model):
            clusters = user_clusters(context, partial(final_states, model, modality), self.config.clusters, rng)
        return dirichlet_clients(clusters, clients, self.config.alpha, rng)

    def _choose_layers(self, context: Context, federation: Federation) -> dict[str, Any]:
        """The layers that carry prompts, by modality; the ratio that was used, and the bytes that all this took."""
        model = context.state.model
        with without_prompts(model):
            scores, sent = federated_scores(context, federation)
        ratios: dict[Modality, float] = dict.fromkeys(scores, self.config.layer_ratio)
        if self.config.ratio_from == "spectrum":
            ratios, more = self._spectrum(context, federation)
            sent += more
        depths = {modality: len(model.views[modality].layers) for modality in scores}
        layers = {modality: best_layers(scores[modality], ratios[modality]) for modality in depths}
        return {"layers": layers, "ratios": ratios, "scores": scores, "bytes": sent}

    def _spectrum(self, context: Context, federation: Federation) -> tuple[dict[Modality, float], int]:
        """The share of layers by the Hessian, mean of the clients of the last of some rounds with all prompts."""
        model = context.state.model
        start = {name: value.clone() for name, value in trained(model).items()}
        server, sent, number = FedAvg({name: value.cpu() for name, value in start.items()}), 0, 0
        for number in range(1, max(1, round(ESTIMATE_SHARE * self._round_number(context, federation))) + 1):
            result = federation.play(context, server, number)
            sent += result["bytes_up"] + result["bytes_down"]
        federation.forget()
        put(model, server.model)
        model.eval()
        prompts = [list(prefix.parameters()) for prefix in partial_prefixes(model).values()]
        found = []
        for client in federation.sample(context.seed, number):
            batch = next(iter(context.batches(federation.clients[client])))
            found.append(hessian_ratios(partial(_loss, self, model, batch), prompts))
        put(model, start)
        ratios = dict(zip(partial_prefixes(model), np.mean(found, axis=0).tolist(), strict=True))
        return ratios, sent + 4 * sum(map(len, found))

    # --- result -------------------------------------------------------------------------------------------------

    def state(self, model: Recommender) -> dict[str, Tensor]:
        """What trains, and the layers that the prompts belong to."""
        chosen = {
            f"encoders.{modality}.prefix.chosen": torch.tensor(prefix.chosen)
            for modality, prefix in partial_prefixes(model).items()
        }
        return super().state(model) | chosen

    def load_state(self, model: Recommender, state: Mapping[str, Tensor]) -> None:
        """Load a ``state``, which says in which layers the prompts are."""
        left = dict(state)
        for modality, prefix in partial_prefixes(model).items():
            chosen = left.pop(f"encoders.{modality}.prefix.chosen")
            if chosen.ndim != 1 or not set(chosen.tolist()) <= set(range(len(model.views[modality].layers))):
                raise ValueError(f"state of another structure: prompts in layers {chosen.tolist()} of {modality}")
            prefix.choose(chosen.tolist())
        super().load_state(model, left)

    def report(self, model: Recommender) -> dict[str, float]:
        """Clients, layers, bytes and times of the rounds; empty before them."""
        if not self.rounds:
            return {}
        sizes = trained(model)
        prompts = nbytes({name: value for name, value in sizes.items() if PROMPT in name})
        best = max((one for one in self.rounds if one.found), key=lambda one: one.found.recall_10)  # type: ignore[union-attr]
        assert best.found is not None
        place = self.rounds.index(best)
        totals = {name: sum(getattr(one, name) for one in self.rounds) for name in ("bytes_up", "bytes_down")}
        return {
            "rounds": len(self.rounds),
            "best_round": place + 1,
            "after_best_s": sum(one.serial_s for one in self.rounds[place + 1 :]),
            "valid_recall_10": best.found.recall_10,
            "valid_ndcg_10": best.found.ndcg_10,
            "passes": sum(one.users for one in self.rounds) / self._users,
            "serial_s": sum(one.serial_s for one in self.rounds),
            "parallel_s": sum(one.parallel_s for one in self.rounds),
            **pass_seconds(self.rounds, self._users),
            **totals,
            "prompt_message_bytes": prompts,
            "head_message_bytes": nbytes(sizes) - prompts,
            "estimate_bytes": self._estimated["bytes"],
            **{
                f"{modality}_prompted_layers": len(prefix.chosen)
                for modality, prefix in partial_prefixes(model).items()
            },
        }


def _loss(method: Method, model: Recommender, batch: Batch) -> Tensor:
    """The task's loss of a batch, with its graph."""
    vectors = method.encode(model, batch.items)
    users = model.user_vectors(vectors[batch.slot[:, :-1]], batch.mask)
    return in_batch_loss(users, vectors, batch.candidates)
