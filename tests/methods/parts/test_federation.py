"""Parts of a federation: partition, averages and server steps written out, layer scores, the Hessian's spectrum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tpme.methods.parts.federation import Federation, Round, pass_seconds
from tpme.methods.parts.federation_clients import dirichlet_clients, iid_clients, kmeans
from tpme.methods.parts.federation_layers import (
    best_layers,
    hessian_product,
    hessian_ratios,
    lanczos,
    layer_score,
    mass_above,
    plateau,
)
from tpme.methods.parts.federation_server import FedAvg, FedPepTAOServer, Reply, mean_state, nbytes, weights_of


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 7, 20])
def test_every_user_is_in_one_client_and_every_client_has_two_users(clients: int) -> None:
    """One user alone has no negatives, so that its client would learn nothing."""
    cluster = rng(1).integers(0, 4, 40)
    for part in (iid_clients(40, clients, rng()), dirichlet_clients(cluster, clients, 1.0, rng())):
        assert part.shape == (40,)
        assert np.bincount(part, minlength=clients).min() >= 2


def test_the_partition_follows_from_the_seed() -> None:
    cluster = rng(1).integers(0, 4, 60)
    first, again, other = (dirichlet_clients(cluster, 6, 0.5, rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_small_alpha_gives_one_sided_clients() -> None:
    """The share of a client's commonest cluster, of five: near a fifth only for a large alpha."""
    cluster = np.arange(2000) % 5

    def one_sided(alpha: float) -> float:
        client = dirichlet_clients(cluster, 10, alpha, rng())
        return float(np.mean([np.bincount(cluster[client == c]).max() / (client == c).sum() for c in range(10)]))

    assert one_sided(0.01) > 0.5 > 0.35 > one_sided(1000.0)


def test_kmeans_finds_directions_and_makes_no_more_clusters_than_points_differ() -> None:
    centres = np.eye(3)
    points = (centres[np.arange(30) % 3] + 0.05 * rng().normal(size=(30, 3))) * rng(1).uniform(1, 9, (30, 1))
    found = kmeans(points, 3, rng(2))
    assert len({(int(c), int(i % 3)) for i, c in enumerate(found)}) == 3
    assert set(kmeans(np.ones((5, 2)), 4, rng()).tolist()) == {0}


def test_the_share_of_sampled_clients_is_rounded_down_and_at_least_one() -> None:
    clients = [np.array([user]) for user in range(30)]
    rounds = {share: Federation(clients, share=share, local_epochs=2) for share in (0.01, 0.1, 0.35, 1.0)}
    assert {share: one.per_round for share, one in rounds.items()} == {0.01: 1, 0.1: 3, 0.35: 10, 1.0: 30}
    assert rounds[0.1].pass_rounds == 5
    drawn = rounds[0.35].sample(1, 2)
    assert len(set(drawn)) == 10
    assert drawn == rounds[0.35].sample(1, 2) != rounds[0.35].sample(1, 3)


def test_time_of_a_pass_is_that_of_as_many_rounds_as_process_every_user_once() -> None:
    """Three rounds of 20, 10 and 10 users; the first is a warm-up: 60 users at 0.3 s and 0.5 s a user."""
    rounds = [Round(20, 0, 0, 100.0, 50.0), Round(10, 0, 0, 3.0, 1.0), Round(10, 0, 0, 5.0, 2.0)]
    assert pass_seconds(rounds, 60) == pytest.approx({"pass_s": 24.0, "pass_parallel_s": 9.0})
    assert pass_seconds(rounds[:1], 60)["pass_s"] == pytest.approx(300.0)


# --- server -----------------------------------------------------------------------------------------------------------


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"p": torch.randn(3, 2, generator=generator), "head": torch.randn(4, generator=generator)}


def replies_of(seed: int, sizes: dict[int, tuple[int, int]]) -> dict[int, Reply]:
    """A reply of every client, of (users, steps)."""
    return {k: Reply(draw(100 * seed + k), users, steps, 0.04) for k, (users, steps) in sizes.items()}


def test_an_average_is_weighted_by_users_and_that_of_equal_updates_is_the_update() -> None:
    replies = replies_of(1, {0: (1, 1), 4: (3, 2)})
    assert weights_of(replies) == {0: 0.25, 4: 0.75}
    server = FedAvg(draw(0))
    server.update(replies)
    expected = 0.25 * replies[0].state["p"] + 0.75 * replies[4].state["p"]
    torch.testing.assert_close(server.model["p"], expected)
    same = {k: Reply(draw(5), users, 1, 0.04) for k, users in enumerate((3, 7, 11))}
    server.update(same)
    assert all(torch.equal(server.model[name], value) for name, value in draw(5).items())


def make_server(**changes: Any) -> FedPepTAOServer:
    return FedPepTAOServer(draw(0), ["p"], **({"rate": 0.05, "momentum": 0.9, "share": 0.5} | changes))


ROUNDS: list[dict[int, tuple[int, int]]] = [
    {0: (10, 2), 2: (30, 6)},
    {1: (20, 4), 2: (30, 6)},
    {0: (10, 2), 1: (20, 4)},
    {2: (30, 6), 3: (5, 1)},
]


def test_the_server_step_is_the_published_one_with_one_momentum_for_all_clients_of_a_round() -> None:
    """Written out in numpy, round by round and client by client."""
    server, eta = make_server(), 0.04
    model = draw(0)["p"].double().numpy()
    v, c, c_of, before, rate = 0 * model, 0 * model, dict.fromkeys(range(4), 0 * model), None, 0.05
    for number, sizes in enumerate(ROUNDS):
        replies = replies_of(number, sizes)
        server.update(replies)
        states = {k: reply.state["p"].double().numpy() for k, reply in replies.items()}
        w = {k: users / sum(u for u, _ in sizes.values()) for k, (users, _) in sizes.items()}
        mean = sum(w[k] * states[k] for k in sizes)
        delta = model - mean
        new = {k: c_of[k] - c + (model - states[k]) / (steps * eta) for k, (_, steps) in sizes.items()}
        changes = sum(steps * (new[k] - c_of[k]) for k, (_, steps) in sizes.items())
        c = c + 0.5 * changes / sum(steps for _, steps in sizes.values())
        if before is None:
            model = mean
        else:
            rate = max(0.99 * rate, 0.0001)
            tau = np.mean([steps for _, steps in sizes.values()])
            u = {k: 0.9 * v + 0.1 * (before - delta) + (c - new[k]) for k in sizes}
            model = sum(w[k] * (mean - rate * tau * eta * u[k]) for k in sizes)
            v = sum(w[k] * u[k] for k in sizes)
        before, c_of = delta, c_of | new
        torch.testing.assert_close(server.model["p"], torch.tensor(model).float(), atol=1e-5, rtol=1e-5)
        heads = mean_state({k: Reply({"head": r.state["head"]}, r.users, 1, 0.04) for k, r in replies.items()})
        assert torch.equal(server.model["head"], heads["head"].float())


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_server_does_not_undo_what_clients_of_few_steps_agree_on(steps: int) -> None:
    """All move P by -tau eta: 40 rounds lead about as far as FedAvg. A fixed eta_s of 1.25 eta leads back (tau = 2)."""
    start, eta, draws = torch.zeros(1), 0.01, rng()
    server = FedPepTAOServer({"p": start}, ["p"], rate=0.05, momentum=0.9, share=0.1)
    for _ in range(40):
        moved = {"p": server.model["p"] - steps * eta}
        server.update({int(k): Reply(moved, 10, steps, eta) for k in draws.choice(100, 10, replace=False)})
    assert 0.75 < float(-server.model["p"]) / (40 * steps * eta) < 1.25


def test_without_a_step_the_server_is_fedavg_to_the_last_bit() -> None:
    plain, still = FedAvg(draw(0)), make_server(rate=0.0)
    for number, sizes in enumerate(ROUNDS):
        for server in (plain, still):
            server.update(replies_of(number, sizes))
        assert all(torch.equal(plain.model[name], still.model[name]) for name in plain.model)


def test_control_variates_of_one_client_cancel_and_with_all_clients_c_is_their_mean() -> None:
    alone, whole = make_server(share=1.0), make_server(share=1.0)
    for number in range(4):
        alone.update(replies_of(number, {0: (10, 3)}))
        whole.update(replies_of(number, dict.fromkeys(range(4), (10, 3))))
    torch.testing.assert_close(alone.drift.control["p"], alone.drift.of_client[0]["p"], atol=1e-5, rtol=1e-5)
    mean = torch.stack([whole.drift.of_client[k]["p"] for k in range(4)]).mean(dim=0)
    torch.testing.assert_close(whole.drift.control["p"], mean, atol=1e-5, rtol=1e-5)


def test_a_server_that_took_over_a_round_goes_on_like_the_one_that_played_it() -> None:
    first = make_server()
    second = make_server()
    for number, sizes in enumerate(ROUNDS[:3]):
        replies = replies_of(number, sizes)
        first.update(replies)
        second.load(first.tensors(replies))
    for server in (first, second):
        server.update(replies_of(9, ROUNDS[3]))
    assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)


def test_bytes_of_a_message() -> None:
    assert nbytes(draw(0)) == 4 * (6 + 4)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_score_of_orthogonal_inputs_and_of_alike_ones() -> None:
    b = 8
    assert layer_score(3 * torch.eye(b, 20)) == pytest.approx(b * (math.log(1 + 1e-5) + 1 / (1 + 1e-5)), rel=1e-9)
    alike = torch.ones(b, 20) + 0.01 * torch.randn(b, 20, generator=torch.Generator().manual_seed(0))
    assert layer_score(alike) > 1e4
    assert layer_score(torch.ones(b, 20)) == pytest.approx((b - 1) * (math.log(1e-5) + 1e5), rel=1e-4)


def test_a_score_does_not_depend_on_order_or_length() -> None:
    states = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    score = layer_score(states)
    assert layer_score(states[torch.tensor([3, 1, 0, 5, 2, 4])]) == pytest.approx(score)
    assert layer_score(7 * states) == pytest.approx(score)


def test_the_highest_scores_are_kept_at_least_one() -> None:
    assert best_layers([5.0, 9.0, 9.0, 0.0], 0.5) == [1, 2]
    assert best_layers([5.0, 9.0, 9.0, 0.0], 0.1) == [1]
    assert best_layers([5.0, 9.0, 9.0, 0.0], 1.0) == [0, 1, 2, 3]


def test_full_lanczos_gives_the_spectral_density_of_a_known_matrix() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    matrix = basis @ torch.diag(values) @ basis.T
    start = basis.sum(dim=1)  # the same share of every eigenvector
    nodes, weights = lanczos(lambda v: matrix @ v, start)
    torch.testing.assert_close(nodes, values)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert mass_above(nodes, weights, -10.0) == pytest.approx(1.0)
    for bound, above in ((0.0, 0.7), (1.5, 0.5), (5.5, 0.1)):
        assert mass_above(nodes, weights, bound) == pytest.approx(above, abs=1e-6)
    few, _ = lanczos(lambda v: matrix @ v, start, steps=4)
    assert len(few) == 4


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [([0.5, 5.0], [0.7, 0.3]), ([-1.0, 1.0], [0.5, 0.5]), ([-1.0, -0.5, 0.01, 0.02, 3.0], [0.2] * 5), ([-1.0], [1.0])],
)
def test_the_plateau_lies_between_half_of_the_positive_mass_and_all_of_it(
    nodes: list[float], weights: list[float]
) -> None:
    def ratio(bound: float) -> float:
        return mass_above(torch.tensor(nodes), torch.tensor(weights), bound)

    assert ratio(0.0) / 2 <= plateau(ratio) <= ratio(0.0)


def test_products_with_the_hessian_through_attention() -> None:
    """Against torch's own Hessian; fused attention has no second derivative."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    prompt = torch.randn(2, 4, requires_grad=True)

    def loss(value: Tensor | None = None) -> Tensor:
        own = prompt if value is None else value
        keys = torch.cat([own[None, None], key], dim=2)
        attended = torch.nn.functional.scaled_dot_product_attention(query, keys, keys)
        return attended.pow(2).sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, prompt.detach()).reshape(8, 8)
        product = hessian_product(loss(), [prompt])
    vector = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(product(vector), hessian.double() @ vector, atol=1e-4, rtol=1e-4)
    [ratio] = hessian_ratios(loss, [[prompt]])
    assert 0 <= ratio <= 1
