"""TPGM: the gradient of its radii against finite differences, its projection split, and its second pass."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tpme.bench.cli import app
from tpme.bench.errors import UserError
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.run.cell import CellRun
from tpme.bench.train.loop import Trainer
from tpme.methods.parts.projection import FLOOR, Balls
from tpme.methods.registry import create
from tpme.methods.tpgm import TPGM, TrainableProjection


def cell_of(world: Any, folder: Path, options: dict[str, Any] | None = None, **training: Any) -> Trainer:
    matrix = world.matrix([{"name": "tpgm", "options": options or {}}], training=training)
    return CellRun(world.job(matrix, folder), PhaseLog("cpu", None, None), lambda _what, _share: None).prepare()


# --- the radii ------------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    return parts.double()


def loss_of(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(16, 2, 3, 3, dtype=torch.float64)
    loss: Tensor = (model(x) - x.flatten(1)[:, :2].sin()).square().mean()
    return loss


def started(model: nn.Module) -> TrainableProjection:
    """An optimiser after five steps, with radii between the norms of the rows."""
    group = {"params": list(model.parameters()), "lr": 1e-2, "name": "text", "projected": True}
    optimizer = TrainableProjection([group], radius_lr=1e-2, fused=True)
    for step in range(5):
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for ball in optimizer.balls:
        ordered = ball.norm.sort(1).values
        middle = ordered.shape[1] // 2
        ball.radius.copy_(ordered[:, [middle - 1, middle]].mean(1, keepdim=True) * (0.6 if middle == 0 else 1))
        with torch.no_grad():
            ball.project()
    return optimizer


def test_the_gradient_of_the_radii_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer, found, h = started(model), [], 1e-6
    monkeypatch.setattr(Balls, "learn", lambda _self, slopes, _lr: found.append(slopes))
    optimizer.learn(loss_of(model, 77))
    compared = 0
    with torch.no_grad():
        for ball, slopes in zip(optimizer.balls, found, strict=True):
            for tensor in range(len(ball.tensors)):
                losses = []
                for change in (h, -2 * h):
                    ball.radius[tensor] += change
                    ball.project()
                    losses.append(float(loss_of(model, 77)))
                ball.radius[tensor] += h
                ball.project()
                assert float(slopes[tensor]) == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-4, abs=1e-9)
                compared += 1
    assert compared == len(list(model.parameters()))
    assert any(
        bool((ball.norm < ball.radius).any()) and bool((ball.norm > ball.radius).any()) for ball in optimizer.balls
    )


def test_a_first_radius_is_half_the_least_norm_and_learns_downhill() -> None:
    model = net()
    group = {"params": list(model.parameters()), "lr": 1e-2, "name": "text", "projected": True}
    optimizer = TrainableProjection([group], radius_lr=1e-3, fused=True)
    loss_of(model, 0).backward()
    optimizer.step()
    for ball in optimizer.balls:
        torch.testing.assert_close(ball.radius, (ball.norm.amin(1, keepdim=True) / 2).clamp(min=FLOOR))
    before = [ball.radius.clone() for ball in optimizer.balls]
    first = float(loss_of(model, 77).detach())
    for _ in range(20):
        optimizer.learn(loss_of(model, 77))
    assert float(loss_of(model, 77).detach()) < first
    for ball, was in zip(optimizer.balls, before, strict=True):
        assert not torch.equal(ball.radius, was)
        assert bool((ball.radius <= ball.norm.amax(1, keepdim=True)).all())
        assert bool((ball.radius >= FLOOR).all())


# --- the split ------------------------------------------------------------------------------------------------------


def test_radii_learn_on_other_users_than_the_weights(world: Any, tmp_path: Path) -> None:
    share = 0.2
    trainer = cell_of(world, tmp_path, {"projection_users": share}, epochs=2, max_steps_per_epoch=None)
    seen: dict[str, list[Any]] = {"train": [], "projection": []}
    batches, epoch_loop, items = trainer.batches, trainer.train_epoch, set()

    def projected(users: Any = None) -> Any:
        seen["projection"].append(np.array(users))
        for batch in batches(users):
            items.update(batch.items.ids.tolist())
            yield batch

    def trained(*arguments: Any) -> Any:
        seen["train"].append(trainer.loader.users)
        return epoch_loop(*arguments)

    trainer.batches, trainer.train_epoch = projected, trained  # type: ignore[method-assign]
    trainer.run()
    [train], [held] = ({tuple(users) for users in seen[key]} for key in ("train", "projection"))
    assert not set(train) & set(held)
    assert set(train) | set(held) == set(range(trainer.dataset.manifest.users))
    assert len(held) == round(share * len(trainer.users)) == trainer.method.report(trainer.model)["projection_users"]
    # All that is read of them is what they would train on: no validation and no test target.
    assert items
    assert items <= set(trainer.dataset.train_slots[list(held)].flatten().tolist())


def test_the_split_depends_on_the_seed_alone(world: Any, tmp_path: Path) -> None:
    trainer = cell_of(world, tmp_path)
    method = TPGM(TPGM.Config())
    found = method.projection_users(trainer)
    assert np.array_equal(found, TPGM(TPGM.Config(interval=3)).projection_users(trainer))
    trainer.seed += 1
    assert not np.array_equal(found, method.projection_users(trainer))


@pytest.mark.parametrize(("share", "users", "held"), [(0.001, 60, 0), (0.999, 60, 60), (0.1, 12, 1), (0.5, 2, 1)])
def test_a_split_needs_two_users_on_both_sides(share: float, users: int, held: int) -> None:
    """The loss of one user is 0, and its gradient."""
    line = f"method 'tpgm': projection_users = {share:g} divides the {users} training users into {held} for the radii"
    with pytest.raises(UserError, match=line) as error:
        TPGM(TPGM.Config(projection_users=share)).check_run(users)
    assert "\n" not in str(error.value)
    TPGM(TPGM.Config(projection_users=0.5)).check_run(4)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_split_that_is_too_small_is_refused_before_anything_runs(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = world.matrix([{"name": "tpgm", "options": {"projection_users": 0.999}}])
    ended = CliRunner().invoke(app, [command, str(world.write(tmp_path / "m.toml", rows)), "--store", str(world.store)])
    assert isinstance(ended.exception, UserError)
    assert "divides the 60 training users into 60 for the radii and 0 for the weights" in str(ended.exception)
    assert not (tmp_path / "runs").exists()


# --- the second pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_step_ends_projected_with_radii_learnt_in_eval_mode(
    monkeypatch: pytest.MonkeyPatch, world: Any, tmp_path: Path, precision: str
) -> None:
    trainer = cell_of(world, tmp_path, precision=precision, users_per_batch=20, epochs=1, max_steps_per_epoch=3)
    modes, types = [], []
    learn = TrainableProjection.learn

    def noted(self: TrainableProjection, loss: Tensor) -> None:
        modes.append(trainer.model.training)
        learn(self, loss)
        for ball in self.balls:
            types.append({tensor.dtype for tensor in ball.tensors} | {ball.radius.dtype})
            assert bool(ball.radius.isfinite().all())

    monkeypatch.setattr(TrainableProjection, "learn", noted)
    start = {name: value.detach().clone() for name, value in trainer.model.encoders.named_parameters()}
    optimizer = trainer.optimizer()
    trainer.train_epoch(optimizer, "epoch 1")
    assert modes == [False] * 3
    assert trainer.model.training
    assert all(found == {torch.float32} for found in types)
    for name, value in trainer.model.encoders.named_parameters():
        state = optimizer.state[value]
        assert torch.equal(state["anchor"], start[name])
        moved = (value - start[name]).detach().abs()
        norm = moved.flatten(1).sum(1).max() if moved.ndim > 1 else moved.sum()
        rounding = float(start[name].abs().max()) * torch.finfo().eps * value.numel()
        assert float(norm) <= float(state["radius"]) * (1 + 1e-5) + rounding
        assert int(state["radius_step"]) == int(state["step"]) == 3


def test_a_skipped_step_has_no_second_pass(monkeypatch: pytest.MonkeyPatch, world: Any, tmp_path: Path) -> None:
    trainer = cell_of(world, tmp_path, precision="fp16", users_per_batch=20, epochs=1, max_steps_per_epoch=3)
    optimizer = trainer.optimizer()
    overflow, calls = iter((True, False, False)), []
    weight = next(trainer.model.encoders.parameters())

    def overflows(of: nn.Parameter) -> None:
        if next(overflow):
            of.grad.fill_(torch.inf)

    weight.register_post_accumulate_grad_hook(overflows)
    learn = TrainableProjection.learn
    monkeypatch.setattr(TrainableProjection, "learn", lambda self, loss: (calls.append(1), learn(self, loss)))
    trainer.train_epoch(optimizer, "epoch 1")
    assert len(calls) == int(optimizer.state[weight]["step"]) == int(optimizer.state[weight]["radius_step"]) == 2


def test_an_overflow_in_the_second_pass_changes_no_radius() -> None:
    model = net()
    optimizer = started(model)
    before = [ball.radius.clone() for ball in optimizer.balls]
    optimizer.learn(loss_of(model, 77) * torch.inf)
    for ball, was in zip(optimizer.balls, before, strict=True):
        assert torch.equal(ball.radius, was)
    optimizer.learn(loss_of(model, 77))
    assert not any(torch.equal(ball.radius, was) for ball, was in zip(optimizer.balls, before, strict=True))


def test_an_interval_saves_passes(monkeypatch: pytest.MonkeyPatch, world: Any, tmp_path: Path) -> None:
    trainer = cell_of(world, tmp_path, {"interval": 2}, epochs=2, users_per_batch=10, max_steps_per_epoch=5)
    passes = []
    learn = TrainableProjection.learn
    monkeypatch.setattr(TrainableProjection, "learn", lambda self, loss: (passes.append(1), learn(self, loss)))
    trainer.run()
    assert len(passes) == trainer.state.step // 2 == 5
    assert isinstance(trainer.method, TPGM)
    assert trainer.method.projection is None
    report = trainer.method.report(trainer.model)
    assert 0 < report["text_distance"] < 0.2
    assert report["projection_users"] == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"projection_users": 0.0}, "option 'projection_users'"),
        ({"projection_users": 1.0}, "option 'projection_users'"),
        ({"interval": 0}, "option 'interval'"),
    ],
)
def test_bad_options_are_refused(tiny: ModuleType, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        create("tpgm", options)
    assert "\n" not in str(error.value)
