"""FTP: its radii against the released optimiser and the paper's rule, its groups, and what a cell holds of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import UserError
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import LearningRates
from tpme.bench.run.cell import CellRun
from tpme.bench.train.loop import Trainer
from tpme.methods.ftp import FTP, FastProjection
from tpme.methods.parts.projection import FLOOR
from tpme.methods.registry import create

RATE = 1e-2


def optimizer_of(*weights: nn.Parameter, annealing: float = 1.0, lr: float = 1e-2) -> FastProjection:
    group = {"params": list(weights), "lr": lr, "name": "text", "projected": True}
    return FastProjection([group], radius_lr=RATE, annealing=annealing, fused=True)


def cell_of(world: Any, folder: Path, method: str, **changes: Any) -> Trainer:
    job = world.job(world.matrix([method], **changes), folder)
    return CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None).prepare()


# --- the radii ------------------------------------------------------------------------------------------------------


def test_the_second_step_moves_a_radius_by_three_quarters_of_its_rate() -> None:
    """Adam's bias correction counts the first step, which has no displacement to learn from."""
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = optimizer_of(weight)
    for expected in (FLOOR, FLOOR + 0.7441 * RATE):
        weight.grad = torch.full((3, 4), 0.3)
        optimizer.step()
        radius = float(optimizer.state[weight]["radius"])
        assert radius == pytest.approx(expected, rel=1e-4)
        assert float(weight.detach().abs().sum(1).max()) <= radius * (1 + 1e-5)


class Released:
    """The update of the released code (GT-RIPL/FTP, util/FTP.py, class AdamP), tensor by tensor, as it is described."""

    def __init__(self, weight: nn.Parameter, annealing: float) -> None:
        self.weight, self.anchor, self.annealing = weight, weight.detach().clone(), annealing
        self.radius, self.moments, self.adam = FLOOR, [0.0, 0.0], [torch.zeros_like(weight), torch.zeros_like(weight)]
        self.last: tuple[Tensor, Tensor] | None = None
        self.t = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        grad, (mean, square) = self.weight.grad, self.adam
        self.t += 1
        mean.mul_(0.9).add_(grad, alpha=0.1)
        square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        corrected = [1 - beta**self.t for beta in (0.9, 0.999)]
        moved = self.weight - lr * (mean / corrected[0]) / ((square / corrected[1]).sqrt() + 1e-8) - self.anchor
        dims = tuple(range(1, moved.ndim)) or tuple(range(moved.ndim))
        norm = moved.abs().sum(dims, keepdim=True) + 1e-8
        if self.last is not None:
            slope = float((grad * self.last[0] / self.last[1]).sum())
            slope *= self.annealing if slope > 0 else 1.0
            first, second = self.moments
            self.moments = [0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2]
            step = (self.moments[0] / corrected[0]) / (math.sqrt(self.moments[1] / corrected[1]) + 1e-8)
            self.radius = min(max(self.radius - RATE * step, FLOOR), float(norm.max()))
        self.weight.copy_(self.anchor + (self.radius / norm).clamp(0, 1) * moved)
        self.last = moved, norm


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3))


def trained(model: nn.Module, steps: int, update: Any) -> None:
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        x = torch.randn(32, 8)
        model.zero_grad()
        (model(x) - torch.sin(x[:, :3])).square().mean().backward()
        update()


@pytest.mark.parametrize("annealing", [1.0, 0.5, 0.0])
def test_sixty_steps_are_those_of_the_rule_written_out(annealing: float) -> None:
    ours, theirs = net(), net()
    optimizer = optimizer_of(*ours.parameters(), annealing=annealing)
    rules = [Released(weight, annealing) for weight in theirs.parameters()]
    trained(ours, 60, optimizer.step)
    trained(theirs, 60, lambda: [rule.step(1e-2) for rule in rules])
    for own, expected, rule in zip(ours.parameters(), theirs.parameters(), rules, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=0)
        assert float(optimizer.state[own]["radius"]) == pytest.approx(rule.radius, rel=1e-4)


def test_radii_are_those_of_the_released_optimiser() -> None:
    """Constants: AdamP of GT-RIPL/FTP, 60 steps of this training; its weights and ours differed by at most 1.2e-7."""
    model = net()
    optimizer = optimizer_of(*model.parameters())
    trained(model, 60, optimizer.step)
    radii = [float(optimizer.state[weight]["radius"]) for weight in model.parameters()]
    assert radii == pytest.approx([0.51096, 0.2955, 0.48447, 0.2186, 0.51246, 0.22695], abs=1e-4)


def test_without_annealed_force_radii_only_grow() -> None:
    """But for the upper bound, the largest norm of a row. With k = 1, some shrink."""
    for annealing, shrinks in ((0.0, False), (1.0, True)):
        model, shrunk = net(), False
        optimizer = optimizer_of(*model.parameters(), annealing=annealing, lr=3e-2)
        before = dict.fromkeys(model.parameters(), 0.0)

        def update(before: dict[nn.Parameter, float] = before, optimizer: FastProjection = optimizer) -> None:
            nonlocal shrunk
            optimizer.step()
            for weight, was in before.items():
                state = optimizer.state[weight]
                shrunk |= float(state["radius"]) < min(was, float(state["norm"].max())) - 1e-9
                before[weight] = float(state["radius"])

        trained(model, 60, update)
        assert shrunk == shrinks


def test_the_first_step_stays_at_the_pretrained_weights() -> None:
    model, fresh = net(), net()
    trained(model, 1, optimizer_of(*model.parameters(), lr=0.1).step)
    for own, start in zip(model.parameters(), fresh.parameters(), strict=True):
        assert float((own - start).detach().abs().max()) <= 1e-8
    assert not all(torch.equal(own, start) for own, start in zip(model.parameters(), fresh.parameters(), strict=True))


# --- the method -----------------------------------------------------------------------------------------------------


def test_groups_are_named_and_encoders_alone_are_projected(tiny: ModuleType) -> None:
    method, model = tiny.build("ftp")
    names = {value: name for name, value in model.named_parameters()}
    groups = method.param_groups(model, LearningRates())
    assert {group["name"]: group["projected"] for group in groups} == {
        "recommender": False,
        "text": True,
        "image": True,
    }
    for group in groups:
        assert group["param_names"] == [names[p] for p in group["params"]]
        assert all(name.startswith(f"encoders.{group['name']}.") == group["projected"] for name in group["param_names"])
    anchors = {name: value.detach().clone() for name, value in model.named_parameters()}
    tiny.train(method, model, 3)
    assert method.projection is not None
    for name, value in model.named_parameters():
        state = method.projection.state[value]
        assert ("anchor" in state) == name.startswith("encoders.")
        if "anchor" in state:
            assert torch.equal(state["anchor"], anchors[name])


@pytest.mark.parametrize("name", ["ftp", "tpgm"])
def test_the_last_layers_alone(tiny: ModuleType, name: str) -> None:
    _, model = tiny.build(name, {"last": 1})
    trains = {name for name, value in model.named_parameters() if value.requires_grad and name.startswith("encoders")}
    layers = [model.views["text"].layers[-1], model.views["image"].layers[-1], model.views["image"].final_norm]
    expected = {id(value) for layer in layers for value in layer.parameters()}
    assert {id(dict(model.named_parameters())[name]) for name in trains} == expected
    with pytest.raises(UserError, match=rf"method '{name}': last = 3, but BertModel \(text encoder\) has 2") as error:
        tiny.build(name, {"last": 3})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"annealing": 1.5}, "option 'annealing'"), ({"radius_lr": 0.0}, "option 'radius_lr'"), ({"last": 0}, "'last'")],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        create("ftp", options)
    assert "\n" not in str(error.value)


def test_it_stays_nearer_to_the_pretrained_weights_than_full_fine_tuning(tiny: ModuleType) -> None:
    distance = {}
    for name in ("ftp", "fft"):
        method, model = tiny.build(name)
        start = {key: value.detach().clone() for key, value in model.encoders.named_parameters()}
        losses = tiny.train(method, model, 20)
        assert losses[-1] < losses[0]
        moved = [(value - start[key]).detach().norm() for key, value in model.encoders.named_parameters()]
        distance[name] = float(torch.stack(moved).norm())
    assert 0 < distance["ftp"] < 0.5 * distance["fft"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cell_reports_distances_and_keeps_no_anchor_after_training(
    world: Any, tmp_path: Path, precision: str
) -> None:
    trainer = cell_of(world, tmp_path, "ftp", training={"precision": precision, "epochs": 2, "max_steps_per_epoch": 4})
    held: dict[str, Tensor] = {}
    after_epoch = trainer.method.on_epoch_end

    def note(state: Any) -> None:
        after_epoch(state)
        for p in state.model.encoders.parameters():
            held.update(trainer.method.projection.state[p])

    trainer.method.on_epoch_end = note  # type: ignore[method-assign]
    trainer.run()
    assert {value.dtype for value in held.values()} == {torch.float32}
    report = trainer.method.report(trainer.model)
    last = ("distance", "radius_p10", "radius_p50", "radius_p90", "rows_at_radius")
    keys = (*last, "distance_epoch_1", "distance_epoch_2")
    assert set(report) == {f"{modality}_{key}" for modality in ("text", "image") for key in keys}
    assert 0 < report["text_distance_epoch_1"] < report["text_distance"] == report["text_distance_epoch_2"] < 0.1
    assert FLOOR < report["text_radius_p50"] < 8 * RATE
    assert isinstance(trainer.method, FTP)
    assert trainer.method.projection is None


@pytest.mark.parametrize("name", ["ftp", "tpgm"])
def test_the_counter_of_optimiser_bytes_is_what_is_held(world: Any, tmp_path: Path, name: str) -> None:
    """All that is kept, without the step counts of Adam: four copies of the encoders, two of the recommender."""
    trainer = cell_of(world, tmp_path, name)
    counted = count(MetaCell(trainer.cell, DataShape.of(trainer.dataset))).optimizer_bytes
    optimizer = trainer.optimizer()
    trainer.train_epoch(optimizer, "epoch 1")
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    assert counted == sum(value.nbytes for state in states for key, value in state.items() if key != "step")
    encoders = list(trainer.model.encoders.parameters())
    rows = sum(len(p) if p.ndim > 1 else 1 for p in encoders) + 4 * len(encoders)
    copies = 2 * sum(p.numel() for p in trainer.model.parameters()) + 2 * sum(p.numel() for p in encoders)
    assert counted == 4 * (copies + rows)
