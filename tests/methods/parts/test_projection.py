"""Projection: rows, balls and the state of the optimiser, on plain tensors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpme.methods.ftp import FastProjection
from tpme.methods.parts.projection import FLOOR, Balls, ProjectedAdam, unmoved
from tpme.methods.tpgm import TrainableProjection

SHAPES = [(5,), (3, 4), (2, 3, 2, 2), (1, 6, 4)]
"""A bias; a linear layer; a convolution; a position embedding."""


class Weights(nn.Module):
    """Weights of several shapes, two of each, with a head that is not projected."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.body = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES * 2)
        self.head = nn.Parameter(torch.randn(3, generator=generator))

    def loss(self, step: int) -> Tensor:
        """A loss that differs from step to step."""
        generator = torch.Generator().manual_seed(step)
        terms = [
            ((p - 2 * torch.randn(p.shape, generator=generator).to(p)).square() * (i + 1)).sum()
            for i, p in enumerate(self.parameters())
        ]
        return torch.stack(terms).sum()


def fast(groups: Any, fused: bool = True) -> FastProjection:
    return FastProjection(groups, radius_lr=1e-2, annealing=1.0, fused=fused)


def trainable(groups: Any, fused: bool = True) -> TrainableProjection:
    return TrainableProjection(groups, radius_lr=1e-2, fused=fused)


Make = Callable[..., ProjectedAdam]
KINDS = pytest.mark.parametrize("make", [fast, trainable])


def groups(weights: Weights, lr: float = 1e-2) -> list[dict[str, Any]]:
    return [
        {"params": list(weights.body), "lr": lr, "name": "text", "projected": True},
        {"params": [weights.head], "lr": lr, "name": "recommender", "projected": False},
    ]


def train(weights: Weights, optimizer: ProjectedAdam, steps: range) -> None:
    """Steps with the loss of each; a TPGM's radii learn from the loss of another step."""
    for step in steps:
        optimizer.zero_grad()
        weights.loss(step).backward()
        optimizer.step()
        if isinstance(optimizer, TrainableProjection):
            optimizer.learn(weights.loss(step + 1000))


def rows(tensor: Tensor) -> Tensor:
    """|W_r|_1 of every row, one by one."""
    parts = list(tensor) if tensor.ndim > 1 else [tensor]
    return torch.stack([sum(entry.abs() for entry in part.flatten()) for part in parts])


def values(weights: Weights, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that a step may change."""
    states = [optimizer.state[p] for p in weights.parameters()]
    kept = [state[key] for state in states for key in sorted(state)]
    return [value.detach().clone() for value in (*weights.parameters(), *kept)]


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_and_projection_of_each_row(shape: tuple[int, ...]) -> None:
    anchors = [torch.randn(shape) for _ in range(2)]
    weights = [anchor.clone() for anchor in anchors]
    balls = Balls(weights, [unmoved(weight, FLOOR) for weight in weights])
    moved = [anchor + torch.randn(shape) for anchor in anchors]
    for weight, value in zip(weights, moved, strict=True):
        weight.copy_(value)
    balls.displace()
    norms = [rows(value - anchor) for value, anchor in zip(moved, anchors, strict=True)]
    torch.testing.assert_close(balls.norm, torch.stack(norms))
    radius = 0.7 * balls.norm.mean(1, keepdim=True)  # some rows are within it, if there are several
    balls.radius.copy_(radius)
    balls.project()
    for weight, value, anchor, norm, own in zip(weights, moved, anchors, norms, radius, strict=True):
        for r, row in enumerate(weight if weight.ndim > 1 else [weight]):
            at = (value - anchor)[r] if weight.ndim > 1 else value - anchor
            start = anchor[r] if weight.ndim > 1 else anchor
            torch.testing.assert_close(row, start + min(1.0, float(own / norm[r])) * at)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_slope_is_that_of_a_loss_in_the_radius(shape: tuple[int, ...]) -> None:
    """``d/dgamma L(W0 + gamma u)`` where all rows are at the radius, against autograd."""
    weight = torch.randn(shape, dtype=torch.float64)
    anchor, moved = weight.clone(), weight + torch.randn(shape)
    target = torch.randn(shape, dtype=torch.float64)
    balls = Balls([weight], [unmoved(weight, FLOOR)])
    weight.copy_(moved)
    balls.displace()
    norm = rows(moved - anchor) + FLOOR
    shaped = norm.view(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else norm
    gamma = (0.5 * norm.min()).requires_grad_()
    projected = anchor + gamma * (moved - anchor) / shaped
    projected.retain_grad()
    ((projected - target) ** 3).sum().backward()
    torch.testing.assert_close(balls.slopes([projected.grad]).sum(), gamma.grad)


# --- the optimiser --------------------------------------------------------------------------------------------------


@KINDS
def test_rows_stay_within_their_radius_and_the_head_is_free(make: Make) -> None:
    weights, plain = Weights(), Weights()
    optimizer, adam = make(groups(weights)), torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    anchors = [p.detach().clone() for p in weights.body]
    for step in range(30):
        train(weights, optimizer, range(step, step + 1))
        adam.zero_grad()
        plain.loss(step).backward()
        adam.step()
        for p, anchor in zip(weights.body, anchors, strict=True):
            state = optimizer.state[p]
            assert torch.equal(state["anchor"], anchor)
            rounding = float(anchor.abs().max()) * torch.finfo().eps * p.numel()
            assert float(rows(p.detach() - anchor).max()) <= float(state["radius"]) * (1 + 1e-5) + rounding
    assert torch.equal(weights.head, plain.head)
    assert not torch.allclose(weights.body[1], plain.body[1], atol=1e-2)
    moved = torch.cat([(p - a).detach().flatten() for p, a in zip(weights.body, anchors, strict=True)]).norm()
    radii = torch.cat([optimizer.state[p]["radius"] for p in weights.body]).sort().values
    measured = {key: float(value) for key, value in optimizer.measures().items()}
    assert measured["text_distance"] == pytest.approx(
        float(moved / torch.cat([a.flatten() for a in anchors]).norm()), rel=1e-4
    )
    assert (
        float(radii[0])
        <= measured["text_radius_p10"]
        < measured["text_radius_p50"]
        < measured["text_radius_p90"]
        <= radii[-1]
    )
    assert 0 < measured["text_rows_at_radius"] <= 1
    assert not any(key.startswith("recommender") for key in measured)


@KINDS
@pytest.mark.parametrize("fused", [True, False])
def test_without_a_bound_the_trajectory_is_that_of_adamw(
    monkeypatch: pytest.MonkeyPatch, make: Make, fused: bool
) -> None:
    monkeypatch.setattr(Balls, "bounded", lambda self, _radius: torch.full_like(self.radius, torch.inf))
    weights, plain = Weights(), Weights()
    optimizer = make(groups(weights), fused=fused)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=fused)
    for step in range(30):
        train(weights, optimizer, range(step, step + 1))
        adam.zero_grad()
        plain.loss(step).backward()
        adam.step()
    for p, expected in zip(weights.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, atol=1e-6, rtol=0)
    assert float((weights.body[1] - Weights().body[1]).detach().abs().min()) > 1e-2


@KINDS
def test_a_radius_of_zero_keeps_every_weight(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setattr(Balls, "bounded", lambda self, _radius: torch.zeros_like(self.radius))
    weights = Weights()
    train(weights, make(groups(weights)), range(10))
    assert all(torch.equal(p, start) for p, start in zip(weights.body, Weights().body, strict=True))
    assert not torch.equal(weights.head, Weights().head)


@KINDS
@pytest.mark.parametrize("fused", [True, False])
def test_a_state_dict_continues_a_run(make: Make, fused: bool) -> None:
    weights = Weights()
    optimizer = make(groups(weights), fused=fused)
    train(weights, optimizer, range(7))
    file = io.BytesIO()
    torch.save((weights.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    loaded, state = torch.load(file)
    resumed = Weights()
    resumed.load_state_dict(loaded)
    again = make(groups(resumed), fused=fused)
    again.load_state_dict(state)
    train(weights, optimizer, range(7, 14))
    train(resumed, again, range(7, 14))
    for own, expected in zip(values(resumed, again), values(weights, optimizer), strict=True):
        assert torch.equal(own, expected)


@KINDS
def test_a_copy_continues_as_its_original(make: Make) -> None:
    weights = Weights()
    optimizer = make(groups(weights))
    train(weights, optimizer, range(5))
    twin, copied = copy.deepcopy((weights, optimizer))
    train(twin, copied, range(5, 9))
    train(weights, optimizer, range(5, 9))
    for own, expected in zip(values(twin, copied), values(weights, optimizer), strict=True):
        assert torch.equal(own, expected)


@KINDS
def test_a_tensor_without_a_gradient_shifts_no_other(make: Make) -> None:
    """The state is by tensor: two tensors without a gradient in some steps are as if they had not had these steps."""
    weights, alone = Weights(), Weights()
    optimizer, other = make(groups(weights)), make(groups(alone))
    late = {id(weights.body[0]), id(weights.body[5])}
    for step in range(8):
        optimizer.zero_grad()
        weights.loss(step).backward()
        if step in (0, 3, 4):
            for p in weights.body:
                p.grad = None if id(p) in late else p.grad
        optimizer.step()
        other.zero_grad()
        alone.loss(step).backward()
        other.step()
    for p, expected in zip(weights.body, alone.body, strict=True):
        if id(p) in late:
            assert int(optimizer.state[p]["step"]) == 5
            assert int(optimizer.state[p]["radius_step"]) == (5 if make is fast else 0)
        else:
            assert torch.equal(p, expected)
            assert torch.equal(optimizer.state[p]["radius"], other.state[expected]["radius"])


# --- half precision -------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_scaler_skips_changes_nothing(make: Make, unscaled: bool, fused: bool) -> None:
    """Scales are powers of two, so the steps around it are those of a run without scaler, bit for bit."""
    weights, plain = Weights(), Weights()
    optimizer, other = make(groups(weights), fused=fused), make(groups(plain), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(6):
        for overflow in (True, False) if step in (0, 3) else (False,):
            optimizer.zero_grad()
            scaler.scale(weights.loss(step)).backward()
            if overflow:
                weights.body[2].grad[0] = torch.inf
            if unscaled:
                scaler.unscale_(optimizer)
            before = values(weights, optimizer) if step else [p.detach().clone() for p in weights.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                after = values(weights, optimizer)
                assert all(torch.equal(own, was) for own, was in zip(after, before, strict=False))
                assert all(int(optimizer.state[p].get("step", 0)) == step for p in weights.parameters())
        train(plain, other, range(step, step + 1)) if make is fast else _without_learning(plain, other, step)
    for own, expected in zip(values(weights, optimizer), values(plain, other), strict=True):
        assert torch.equal(own, expected)


def _without_learning(weights: Weights, optimizer: ProjectedAdam, step: int) -> None:
    optimizer.zero_grad()
    weights.loss(step).backward()
    optimizer.step()


# --- what it costs --------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


@KINDS
def test_a_step_takes_as_many_operators_for_many_tensors_as_for_few(make: Make) -> None:
    found = []
    for copies in (1, 6):
        layers = [nn.Parameter(torch.randn(shape)) for shape in SHAPES * copies]
        optimizer = make([{"params": layers, "lr": 1e-2, "name": "text", "projected": True}])
        for p in layers:
            p.grad = torch.randn_like(p)
        optimizer.step()
        with Calls() as calls:
            optimizer.step()
        found.append(calls.number)
    assert found[0] == found[1] < 50 * len(SHAPES)


@KINDS
def test_a_state_is_four_copies_of_the_weights_and_the_rows(make: Make) -> None:
    weights = Weights()
    optimizer = make(groups(weights))
    train(weights, optimizer, range(2))
    states = [optimizer.state[p] for p in weights.body]
    held = sum(value.nbytes for state in states for key, value in state.items() if key != "step")
    sizes = sum(p.numel() for p in weights.body)
    number_of_rows = sum(len(p) if p.ndim > 1 else 1 for p in weights.body)
    assert held == 4 * (4 * sizes + number_of_rows + 4 * len(weights.body))
    assert {value.untyped_storage().data_ptr() for state in states for value in state.values()}.isdisjoint(
        p.untyped_storage().data_ptr() for p in weights.parameters()
    )
