"""Checks of what training leaves: the stored state, the merged model, and what inference costs."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tpme.bench.contract.expect import ContractError, expect_close
from tpme.bench.contract.subject import Subject, vectors
from tpme.bench.counting.encoding import item_flops
from tpme.bench.task.evaluate import item_matrix, rank_split
from tpme.bench.train.loop import Trainer


def state_round_trip(subject: Subject) -> None:
    """The state, loaded into a fresh model of another seed, gives what was trained, its vectors and its ranks.

    A trained parameter may be absent from that model if only training needs it (a reparameterisation).
    """
    trainer = subject.trained.trainer
    fresh = _restored(subject, trainer)
    loaded = dict(fresh.model.named_parameters())
    for name, value in trainer.model.named_parameters():
        if value.requires_grad and name in loaded and not torch.equal(loaded[name], value):
            raise ContractError(f"'{name}' trains, but state() and load_state() do not carry it into a fresh model")
    items = subject.items(trainer)
    if not torch.equal(vectors(fresh.method, fresh.model, items), vectors(trainer.method, trainer.model, items)):
        raise ContractError("a fresh model with the state loaded gives other item vectors")
    if not np.array_equal(_ranks(fresh), _ranks(trainer)):
        raise ContractError("a fresh model with the state loaded ranks the test items differently")


def state_of_another_structure_is_refused(subject: Subject) -> None:
    """load_state raises KeyError for a missing or foreign name, ValueError or RuntimeError for another shape."""
    trainer = subject.trainer()
    method, model = trainer.method, trainer.model
    state: dict[str, Tensor] = dict(method.state(model))
    if not state:
        raise ContractError("state() is empty")
    name = next(iter(state))
    wrong = {
        "without one of its tensors": ({key: value for key, value in state.items() if key != name}, KeyError),
        "with a foreign tensor": (state | {"nothing.of.the.kind": torch.zeros(1)}, KeyError),
        "with a tensor of another shape": (state | {name: torch.zeros(3, 5, 7)}, (ValueError, RuntimeError)),
    }
    for words, (other, expected) in wrong.items():
        try:
            method.load_state(model, other)
        except expected:  # type: ignore[misc]
            continue
        raise ContractError(f"load_state accepts a state {words}")


def merging_changes_no_vector(subject: Subject) -> None:
    """prepare_inference leaves the item vectors of the trained model as they are."""
    method, model = subject.copy_of_trained()
    items = subject.items(subject.trained.trainer)
    before = vectors(method, model, items)
    method.prepare_inference(model)
    expect_close(
        vectors(method, model, items), before, "prepare_inference changes the item vectors of the trained model"
    )


def inference_is_not_dearer(subject: Subject) -> None:
    """Encoding items after prepare_inference takes no more FLOPs than before, and all of them have a formula."""
    method, model = subject.copy_of_trained()
    items, encode = subject.items(subject.trained.trainer), partial(vectors, method, model)
    before, _ = item_flops(encode, items)
    method.prepare_inference(model)
    after, uncounted = item_flops(encode, items)
    if after > before:
        raise ContractError(f"prepare_inference makes an item cost {after:,.0f} FLOPs instead of {before:,.0f}")
    if uncounted:
        raise ContractError(f"encoding items: no FLOP formula for {', '.join(uncounted)}")


def deep_copy_is_independent(subject: Subject) -> None:
    """A deep copy of the model gives the same vectors, and keeps them when the original changes."""
    trainer = subject.trainer()
    method, model, items = trainer.method, trainer.model, subject.items(trainer)
    twin = copy.deepcopy(model)
    before = vectors(method, model, items)
    if not torch.equal(vectors(method, twin, items), before):
        raise ContractError("a deep copy of the model gives other item vectors")
    changed = [
        parameter.data.add_(0.5)
        for name, parameter in model.named_parameters()
        if name.startswith(("encoders.", "item_encoder.")) and parameter.requires_grad
    ]
    if not torch.equal(vectors(method, twin, items), before):
        raise ContractError("a deep copy of the model changes with its original: they share parts")
    if changed and torch.equal(vectors(method, model, items), before):
        raise ContractError("item vectors do not depend on what trains of encoders and item encoder")


def _restored(subject: Subject, trainer: Trainer) -> Trainer:
    """A new trainer of another seed whose model has loaded the state of ``trainer``'s model.

    A search may have ended with another method, or with other options, than the cell's: they tell the structure.
    """
    method = trainer.method
    state = {name: value.clone() for name, value in method.state(trainer.model).items()}
    fresh = subject.trainer(subject.cell(seed=2))
    if (type(method), method.config) != (type(fresh.method), fresh.method.config):
        fresh = fresh.fork(type(method)(method.config), seed=2)
    fresh.method.load_state(fresh.model, state)
    return fresh


def _ranks(trainer: Trainer) -> np.ndarray:
    trainer.model.eval()
    matrix = item_matrix(trainer.encode, trainer.store, trainer.device)
    return rank_split(trainer.model, matrix, trainer.dataset.test)
