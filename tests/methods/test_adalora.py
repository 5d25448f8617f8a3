"""AdaLoRA: its allocation against peft's own, its loss against the definition, its schedule, and what a state holds."""

from __future__ import annotations

import copy
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

from tpme.bench.errors import UserError
from tpme.methods.adalora import AdaLoRA
from tpme.methods.base import PassOutput, Schedule, StepState
from tpme.methods.registry import create

STEPS = 40


def state_of(model: Any, step: int = 0, skipped: bool = False) -> StepState:
    schedule = Schedule(epochs=4, steps_per_epoch=STEPS // 4, popularity=np.zeros(1))
    return StepState(model, schedule, step=step, skipped=skipped)


def fake_step(model: Any, generator: torch.Generator) -> None:
    """Random gradients, and an update by them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(parameter.grad, alpha=-0.01)


def peft_settings(method: AdaLoRA) -> SimpleNamespace:
    config = method.config
    return SimpleNamespace(
        beta1=config.smoothing,
        beta2=config.smoothing,
        target_r=config.target_rank,
        tinit=int(config.warmup * STEPS),
        tfinal=int(config.final * STEPS),
        deltaT=config.interval,
        total_step=STEPS,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 6, "target_rank": 2, "warmup": 0.0, "final": 0.0, "interval": 3, "smoothing": 0.5},
        {"targets": ("query", "ffn_in", "ffn_out"), "warmup": 0.2, "final": 0.3},
    ],
)
def test_ranks_are_allocated_as_by_peft(tiny: ModuleType, options: dict[str, Any]) -> None:
    method, model = tiny.build("adalora", options)
    encoder = model.views["text"].module
    twin = copy.deepcopy(encoder)
    settings = peft_settings(method)
    allocator, pattern = RankAllocator(twin, settings, "default"), None
    last = settings.total_step - settings.tfinal
    ours, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    budget = method.budgets["text"]
    for step in range(1, STEPS + 1):
        fake_step(encoder, ours)
        fake_step(twin, theirs)
        budget.update(step, STEPS)
        if step <= last:  # as AdaLoraModel.update_and_allocate
            _, pattern = allocator.update_and_allocate(twin, step, force_mask=step == last)
        else:
            allocator.mask_using_rank_pattern(twin, pattern)
        for (name, own), expected in zip(encoder.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(own, expected), (step, name)
    assert float(budget.ranks()) == method.config.target_rank


def test_orthogonality_is_a_term_of_the_loss(tiny: ModuleType) -> None:
    method, model = tiny.build("adalora", {"orthogonality": 0.3, "targets": ("query", "ffn_in")})
    expected = torch.zeros(())
    for view in model.views.values():
        norms = []
        for name, p in view.module.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                norms.append((gram - torch.eye(len(gram))).square().sum().sqrt())
        expected = expected + 0.3 * torch.stack(norms).mean()
    terms = method.losses({"task": PassOutput(torch.tensor(2.0), torch.zeros(1), torch.zeros(1))})
    torch.testing.assert_close(terms["orthogonality"], expected)
    assert float(terms["task"]) == 2.0


def test_training_ends_with_the_target_rank_on_average(tiny: ModuleType) -> None:
    method, model = tiny.build("adalora", {"rank": 6, "target_rank": 3})
    generator = torch.Generator().manual_seed(0)
    assert method.report(model)["allocated_rank"] == 6
    for step in range(STEPS):
        fake_step(model, generator)
        method.after_step(state_of(model, step), None)
        ranks = method.report(model)
        assert all(3 <= ranks[f"{modality}_rank"] <= 6 for modality in model.views)
    assert ranks["text_rank"] == ranks["image_rank"] == 3
    parts = [part.lora_E["default"] for part in model.modules() if hasattr(part, "lora_E")]
    assert len({int(part.count_nonzero()) for part in parts}) > 1, "all projections have the same rank"


def test_an_allocation_whose_last_steps_were_skipped_ends_with_the_epoch(tiny: ModuleType) -> None:
    method, model = tiny.build("adalora", {"rank": 6, "target_rank": 3, "final": 0.0})
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS - 20):
        fake_step(model, generator)
        method.after_step(state_of(model, step), None)
        method.on_epoch_end(state_of(model, step + 1))
    assert method.report(model)["text_rank"] > 3
    method.on_epoch_end(state_of(model, STEPS, skipped=True))
    assert method.report(model)["text_rank"] == method.report(model)["image_rank"] == 3


@pytest.mark.parametrize(("steps", "skipped"), [(1, 0), (2, 0), (4, 3)])
def test_the_first_step_that_counts_may_be_the_last_one(tiny: ModuleType, steps: int, skipped: int) -> None:
    """Gradient scalers skip the first steps; then there is no importance from before the end of the pruning."""
    method, model = tiny.build("adalora", {"rank": 6, "target_rank": 3})
    schedule = Schedule(epochs=1, steps_per_epoch=steps, popularity=np.zeros(1))
    generator = torch.Generator().manual_seed(0)
    for step in range(skipped, steps):
        fake_step(model, generator)
        method.after_step(StepState(model, schedule, step=step), None)
    method.on_epoch_end(StepState(model, schedule, step=steps))
    assert method.report(model)["text_rank"] == method.report(model)["image_rank"] == 3


def test_without_any_step_nothing_is_pruned(tiny: ModuleType) -> None:
    method, model = tiny.build("adalora")
    start = {name: value.clone() for name, value in method.state(model).items()}
    method.on_epoch_end(state_of(model, STEPS, skipped=True))
    assert all(torch.equal(value, start[name]) for name, value in method.state(model).items())


def test_importances_are_where_the_model_has_been_moved(tiny: ModuleType) -> None:
    method, model = tiny.build("adalora")
    model.to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(STEPS):
        method.after_step(state_of(model, step), None)
    assert all(group.scores().is_meta for budget in method.budgets.values() for group in budget.groups)


def test_a_state_holds_the_ranks_and_training_goes_on_with_them(tiny: ModuleType) -> None:
    method, model = tiny.build("adalora", {"rank": 6, "target_rank": 3})
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS // 2):
        fake_step(model, generator)
        method.after_step(state_of(model, step), None)
    state = {name: value.clone() for name, value in method.state(model).items()}
    resumed, fresh = tiny.build("adalora", {"rank": 6, "target_rank": 3})
    resumed.load_state(fresh, state)
    assert resumed.report(fresh) == method.report(model)
    zeros = {name for name, value in state.items() if "lora_E" in name for entry in value if not entry}
    assert zeros
    fake_step(fresh, generator)
    resumed.after_step(state_of(fresh, STEPS // 2), None)
    kept = dict(fresh.named_parameters())
    assert all(torch.equal(kept[name] == 0, value == 0) for name, value in state.items() if "lora_E" in name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_rank": 13}, "target_rank 13 is above rank 12"),
        ({"warmup": 0.5, "final": 0.5}, "warmup and final together leave no step"),
        ({"rank": 0}, "option 'rank'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create("adalora", options)


@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_a_rank_above_the_width_is_refused(tiny: ModuleType, name: str) -> None:
    tiny.build(name, {"rank": tiny.WIDTH})
    with pytest.raises(UserError, match=f"method '{name}': rank {tiny.WIDTH + 1} is above the smaller side") as error:
        tiny.build(name, {"rank": tiny.WIDTH + 1})
    assert "\n" not in str(error.value)
