"""Checks of a method before its first step: identity, learning rates, the parameter formula, the exact counters."""

from __future__ import annotations

import math

import torch

from tpme.bench.contract.expect import ContractError, NotApplicable, expect_close
from tpme.bench.contract.subject import Subject, vectors, with_options
from tpme.bench.contract.world import PAIRS
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell, MetaEncoders
from tpme.bench.record import Cell, EncoderSpec, LearningRates, Modality, Training
from tpme.bench.train.build import encoder_specs
from tpme.methods.base import TaskShape

BASE_ENCODERS: dict[Modality, EncoderSpec] = {
    "text": EncoderSpec(source="bert-base-uncased"),
    "image": EncoderSpec(source="google/vit-base-patch16-224"),
}
"""Their configurations are known without a network."""


def identity_at_start(subject: Subject) -> None:
    """Item vectors equal those of the frozen encoders, where the method promises it."""
    trainer = subject.trainer()
    method, model = trainer.method, trainer.model.eval()
    if not method.identity_at_start:
        raise NotApplicable("the method does not promise it (identity_at_start = False)")
    items = subject.items(trainer)
    with torch.no_grad():
        states = {
            modality: subject.fresh_views[modality].encode(
                reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image
            )
            for modality, reads in model.item_encoder.reads.items()
        }
        expected = model.item_encoder(states, items.ids)
    expect_close(
        vectors(method, model, items),
        expected,
        "item vectors differ from those of the frozen encoders; set identity_at_start = False",
    )


def one_learning_rate_each(subject: Subject) -> None:
    """Every parameter that trains is in one group of the optimiser, with a rate above 0 that follows the matrix's."""
    trainer = subject.trainer()
    groups = trainer.method.param_groups(trainer.model, LearningRates(recommender=1.0, text=2.0, image=3.0, method=4.0))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and grouped.count(id(parameter)) != 1:
            raise ContractError(f"'{name}' is in {grouped.count(id(parameter))} groups of param_groups instead of one")
    if not all(group["lr"] > 0 for group in groups):
        raise ContractError("param_groups gives a group a learning rate of 0")
    twice = trainer.method.param_groups(trainer.model, LearningRates(recommender=2.0, text=4.0, image=6.0, method=8.0))
    for group, other in zip(groups, twice, strict=True):
        if group["lr"] == other["lr"]:
            raise ContractError(f"the learning rate of group '{group.get('name', '')}' is not one of the matrix's")


def vectors_and_report(subject: Subject) -> None:
    """Item vectors are finite, (items, width); report() gives finite or missing numbers by name."""
    trainer = subject.trainer()
    items = subject.items(trainer)
    found = vectors(trainer.method, trainer.model, items)
    if found.ndim != 2 or len(found) != len(items) or not bool(found.isfinite().all()):
        raise ContractError(f"item vectors of {len(items)} items are not finite or not two-dimensional: {found.shape}")
    for name, value in trainer.method.report(trainer.model).items():
        if not isinstance(value, int | float):
            raise ContractError(f"report() gives {type(value).__name__} for '{name}', not a number")


# --- what is counted --------------------------------------------------------------------------------------------------


def parameter_formula(subject: Subject) -> None:
    """The formula equals the count at the small shape, also with every option changed, and at the base shape."""
    encoders, data = subject.world.meta_encoders, DataShape.of(subject.world.dataset)
    for options in ({}, *subject.alternatives):
        _compare(with_options(subject, options), subject.cell(), data, encoders, f"{options or 'these options'}")
    if subject.pair == PAIRS[0]:
        base = {f"{modality}_encoder": BASE_ENCODERS[modality] for modality in subject.used}
        cell = subject.cell().model_copy(update=base | {"training": Training()})
        _compare(subject, cell, DataShape.assumed(), encoders, "BERT-base and ViT-B/16")


def _compare(subject: Subject, cell: Cell, data: DataShape, encoders: MetaEncoders, where: str) -> None:
    cell = cell.model_copy(update={"options": subject.options})
    meta = MetaCell(cell, data, encoders, subject.methods_path)
    views = {m: encoders.view(spec, m) for m, spec in encoder_specs(cell, meta.method).items()}
    shapes = {m: view.shape for m, view in views.items()}
    task = TaskShape(cell.training.embedding_dim, data.items, shapes, cell.training.title_tokens)
    try:
        formula = meta.method.trainable_parameters(task, views)
    except NotImplementedError:
        raise ContractError("it has no parameter formula: define trainable_parameters(task, views)") from None
    sequence = {id(parameter) for parameter in meta.model.sequence.parameters()}
    counted = sum(p.numel() for p in meta.model.parameters() if p.requires_grad and id(p) not in sequence)
    if formula != counted:
        raise ContractError(f"trainable_parameters gives {formula:,} at {where}, but {counted:,} parameters train")


def nothing_is_uncounted(subject: Subject) -> None:
    """Every operator of a training step has a FLOP formula, or is known to need none, and the counters are finite."""
    data, encoders = DataShape.of(subject.world.dataset), subject.world.meta_encoders
    counts = count(MetaCell(subject.cell(), data, encoders, subject.methods_path))
    if counts.step.uncounted:
        raise ContractError(f"no FLOP formula for {', '.join(counts.step.uncounted)}")
    for name, reading in counts.readings().items():
        if reading.value is None or not math.isfinite(reading.value):
            raise ContractError(f"the counter {name} is {reading.value}")
