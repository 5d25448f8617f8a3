"""What every method must keep, whoever wrote it.

Methods from elsewhere go through it as well: ``TPME_METHODS_PATH=my/methods pytest tests/methods/test_contract.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tpme.bench.record import LearningRates
from tpme.bench.task.batches import Batch
from tpme.bench.task.items import Items
from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Method
from tpme.methods.registry import create

Build = Callable[..., tuple[Method, Recommender]]
LOOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture
def build(tiny: ModuleType, subject: Any, methods_path: tuple[Path, ...]) -> Build:
    """A freshly adapted model of the subject; always around the same encoders."""

    def make(**settings: Any) -> tuple[Method, Recommender]:
        built: tuple[Method, Recommender] = tiny.build(
            subject.name, subject.options, subject.modalities, methods_path=methods_path, **settings
        )
        return built

    return make


@pytest.fixture
def modalities(tiny: ModuleType, subject: Any, methods_path: tuple[Path, ...]) -> tuple[str, ...]:
    """The encoders that the subject really uses."""
    method = create(subject.name, subject.options, methods_path)
    used: tuple[str, ...] = tiny.used_modalities(method, subject.modalities)
    return used


@pytest.fixture
def items(tiny: ModuleType, modalities: tuple[str, ...]) -> Items:
    """The inputs of the whole catalogue."""
    inputs: Items = tiny.items(modalities)
    return inputs


@pytest.fixture
def train(tiny: ModuleType, subject: Any) -> Callable[[Method, Recommender, int], list[float]]:
    """Some optimiser steps; none where nothing trains."""

    def steps(method: Method, model: Recommender, count: int) -> list[float]:
        if not model.parameter_groups():
            return []
        losses: list[float] = tiny.train(method, model, count, subject.modalities)
        return losses

    return steps


def trainable(model: Recommender) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- at the start ---------------------------------------------------------------------------------------------------


def test_identity_at_the_start(tiny: ModuleType, build: Build, items: Items) -> None:
    method, model = build()
    if not method.identity_at_start:
        pytest.skip("the method does not promise it")
    states = {
        modality: tiny.views((modality,))[modality].encode(
            reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image
        )
        for modality, reads in model.item_encoder.reads.items()
    }
    with torch.no_grad():
        expected = model.eval().item_encoder(states, items.ids)
    torch.testing.assert_close(tiny.vectors(model, items), expected, **LOOSE)


def test_every_trainable_parameter_has_one_learning_rate(build: Build) -> None:
    method, model = build()
    rates = LearningRates(recommender=1.0, text=2.0, image=3.0, method=4.0)
    groups = method.param_groups(model, rates)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainable(model).values())
    assert all(group["lr"] > 0 for group in groups)


# --- training -------------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_bit_identical(
    build: Build, train: Callable[[Method, Recommender, int], list[float]]
) -> None:
    method, model = build(encoder_dropout=0.3, dropout=0.3)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    train(method, model, 3)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in buffers.items())


def test_every_trainable_parameter_learns(
    tiny: ModuleType,
    modalities: tuple[str, ...],
    build: Build,
    train: Callable[[Method, Recommender, int], list[float]],
) -> None:
    """Each has a gradient within two steps, and it is not zero.

    Exempt are biases of keys: one vector added to all keys changes no attention weight, so their gradient is rounding.
    """
    method, model = build()
    data: Batch = tiny.batch(modalities)
    reached: set[str] = set()
    for _ in range(2):
        if not trainable(model):
            break
        train(method, model, 1)
        model.zero_grad()
        tiny.loss_of(model.train(), data).backward()
        assert all(gradient.isfinite().all() for gradient in tiny.gradients(model).values())
        reached |= {name for name, gradient in tiny.gradients(model).items() if gradient.abs().max() > 0}
    exempt = {name for name in trainable(model) if name.endswith(("key.bias", "k_proj.bias"))}
    assert set(trainable(model)) - reached - exempt == set()


def test_training_lowers_the_loss(build: Build, train: Callable[[Method, Recommender, int], list[float]]) -> None:
    losses = train(*build(), 6)
    assert not losses or losses[-1] < losses[0]


def test_training_is_reproducible(
    build: Build, items: Items, tiny: ModuleType, train: Callable[[Method, Recommender, int], list[float]]
) -> None:
    results = []
    for _ in range(2):
        method, model = build(encoder_dropout=0.3, dropout=0.3)
        train(method, model, 2)
        results.append(tiny.vectors(model, items))
    assert torch.equal(*results)


def test_a_step_under_autocast_is_finite(tiny: ModuleType, modalities: tuple[str, ...], build: Build) -> None:
    _, model = build()
    data: Batch = tiny.batch(modalities)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiny.loss_of(model.train(), data)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    if trainable(model):
        loss.backward()
        gradients = tiny.gradients(model)
        assert gradients.keys() == trainable(model).keys()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


# --- item vectors ---------------------------------------------------------------------------------------------------


def test_evaluation_is_deterministic(
    tiny: ModuleType, build: Build, items: Items, train: Callable[[Method, Recommender, int], list[float]]
) -> None:
    method, model = build(encoder_dropout=0.3, dropout=0.3)
    train(method, model, 1)
    first = tiny.vectors(model, items)
    assert torch.equal(tiny.vectors(model, items), first)
    model.train()
    assert torch.equal(tiny.vectors(model, items), first)


def test_items_in_chunks_equal_items_at_once(
    tiny: ModuleType, build: Build, items: Items, modalities: tuple[str, ...]
) -> None:
    _, model = build()
    ids = items.ids.tolist()
    chunks = [tiny.vectors(model, tiny.items(modalities, ids[i : i + 5])) for i in range(0, len(ids), 5)]
    torch.testing.assert_close(torch.cat(chunks), tiny.vectors(model, items), **LOOSE)


def test_longer_padding_changes_nothing(
    tiny: ModuleType,
    build: Build,
    items: Items,
    train: Callable[[Method, Recommender, int], list[float]],
) -> None:
    if items.tokens is None or items.token_mask is None:
        pytest.skip("the method reads no text")
    method, model = build()
    train(method, model, 2)
    garbage = torch.full((len(items), 5), 9)
    longer = replace(
        items,
        tokens=torch.cat([items.tokens, garbage], dim=1),
        token_mask=torch.cat([items.token_mask, torch.zeros_like(garbage)], dim=1),
    )
    torch.testing.assert_close(tiny.vectors(model, longer), tiny.vectors(model, items), **LOOSE)


def test_cached_equals_uncached(tiny: ModuleType, build: Build, modalities: tuple[str, ...], items: Items) -> None:
    """Loss, gradients and vectors on cached states equal those on the encoders, whose dropout must be off."""
    method, model = build(encoder_dropout=0.5)
    if not method.decoupled:
        pytest.skip("the method trains through the encoders")
    _, cached = build(with_views=False)
    assert not list(cached.encoders.parameters())
    with torch.no_grad():
        tables = {m: torch.cat([torch.zeros_like(s[:1]), s]) for m, s in model.hidden_states(items).items()}
    data: Batch = tiny.batch(modalities)
    ids = data.items.ids
    from_cache = replace(data, items=Items(ids, states={m: table[ids] for m, table in tables.items()}))
    loss, cached_loss = tiny.loss_of(model.train(), data), tiny.loss_of(cached.train(), from_cache)
    torch.testing.assert_close(cached_loss, loss, atol=1e-6, rtol=1e-6)
    loss.backward()
    cached_loss.backward()
    gradients, from_states = tiny.gradients(model), tiny.gradients(cached)
    assert gradients.keys() == from_states.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(from_states[name], gradient, atol=1e-6, rtol=1e-4)


# --- the result -----------------------------------------------------------------------------------------------------


def test_a_state_put_into_a_fresh_model_gives_the_same_vectors(
    tiny: ModuleType,
    modalities: tuple[str, ...],
    build: Build,
    items: Items,
    train: Callable[[Method, Recommender, int], list[float]],
) -> None:
    method, model = build(seed=3)
    train(method, model, 2)
    state = {name: value.clone() for name, value in method.state(model).items()}
    other, fresh = build(seed=4)
    other.load_state(fresh, state)
    assert torch.equal(tiny.vectors(fresh, items), tiny.vectors(model, items))
    data: Batch = tiny.batch(modalities)
    assert torch.equal(tiny.loss_of(fresh.eval(), data), tiny.loss_of(model.eval(), data))


def test_a_state_that_does_not_fit_is_refused(build: Build) -> None:
    method, model = build()
    state: dict[str, Tensor] = dict(method.state(model))
    name = next(iter(state))
    with pytest.raises(KeyError):
        method.load_state(model, {key: value for key, value in state.items() if key != name})
    with pytest.raises(KeyError):
        method.load_state(model, state | {"nothing.of.the.kind": torch.zeros(1)})
    with pytest.raises((ValueError, RuntimeError)):
        method.load_state(model, state | {name: torch.zeros(3, 5, 7)})


def test_preparing_for_inference_changes_no_vector(
    tiny: ModuleType, build: Build, items: Items, train: Callable[[Method, Recommender, int], list[float]]
) -> None:
    method, model = build()
    train(method, model, 2)
    before = tiny.vectors(model, items)
    method.prepare_inference(model)
    torch.testing.assert_close(tiny.vectors(model, items), before, **LOOSE)


def test_a_deep_copy_is_a_model_of_its_own(tiny: ModuleType, build: Build, items: Items) -> None:
    _, model = build()
    twin = copy.deepcopy(model)
    before = tiny.vectors(model, items)
    assert torch.equal(tiny.vectors(twin, items), before)
    for name, parameter in model.named_parameters():
        if name.startswith(("encoders.", "item_encoder.")) and parameter.requires_grad:
            parameter.data.add_(0.5)
    assert torch.equal(tiny.vectors(twin, items), before)
    assert not any(p.requires_grad for p in model.item_encoder.parameters()) or not torch.equal(
        tiny.vectors(model, items), before
    )


def test_vectors_and_report_are_what_they_should_be(tiny: ModuleType, build: Build, items: Items) -> None:
    method, model = build()
    vectors = tiny.vectors(model, items)
    assert vectors.shape[0] == len(items)
    assert vectors.ndim == 2
    assert vectors.isfinite().all()
    assert all(isinstance(value, (int, float)) for value in method.report(model).values())
