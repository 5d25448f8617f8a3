"""Checks of item vectors: evaluation repeats, neither chunks nor padding matter, cached states are the encoders'."""

from __future__ import annotations

from dataclasses import replace

import torch

from tpme.bench.contract.expect import ContractError, NotApplicable, expect_close
from tpme.bench.contract.subject import Subject, vectors, with_options
from tpme.bench.run.inputs import feature_job
from tpme.bench.task.items import Items, Reads, States, named_tensors
from tpme.bench.task.view import EncoderView
from tpme.bench.train.feature_builder import build_features
from tpme.bench.train.loop import Trainer
from tpme.bench.train.step import total_loss

HALF = 1e-3
"""Tolerance for states read from a cache: float16 has 11 significant bits."""


def evaluation_repeats(subject: Subject) -> None:
    """Encoding items changes nothing: the same vectors again, also after train(), and the same model."""
    method, model = subject.copy_of_trained()
    items = subject.items(subject.trained.trainer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = vectors(method, model, items)
    if not torch.equal(vectors(method, model, items), first):
        raise ContractError("encoding the same items twice gives different vectors")
    model.train()
    if not torch.equal(vectors(method, model, items), first):
        raise ContractError("item vectors differ after model.train() and model.eval()")
    for name, value in model.state_dict().items():
        if not torch.equal(value, before[name]):
            raise ContractError(f"encoding items changes '{name}'")


def chunks_change_nothing(subject: Subject) -> None:
    """Items encoded in chunks have the vectors of items encoded at once."""
    trainer = subject.trained.trainer
    items = subject.items(trainer)
    ids = items.ids.tolist()
    chunks = [
        vectors(trainer.method, trainer.model, subject.items(trainer, ids[start : start + 7]))
        for start in range(0, len(ids), 7)
    ]
    expect_close(
        torch.cat(chunks),
        vectors(trainer.method, trainer.model, items),
        "items encoded in chunks of 7 have other vectors than items encoded at once",
    )


def padding_changes_nothing(subject: Subject) -> None:
    """Masked tokens behind a title change no vector."""
    trainer = subject.trained.trainer
    items = subject.items(trainer)
    if items.tokens is None or items.token_mask is None:
        raise NotApplicable("the method reads no text")
    garbage = torch.full((len(items), 5), 9)
    longer = replace(
        items,
        tokens=torch.cat([items.tokens, garbage], dim=1),
        token_mask=torch.cat([items.token_mask, torch.zeros_like(garbage)], dim=1),
    )
    expect_close(
        vectors(trainer.method, trainer.model, longer),
        vectors(trainer.method, trainer.model, items),
        "five masked tokens behind every title change the vectors",
    )


# --- cached states ----------------------------------------------------------------------------------------------------


def cached_equals_uncached(subject: Subject) -> None:
    """The method computes the same on cached states, of fresh encoders in half precision, as on its encoders."""
    _require_frozen_encoders(subject)
    trainer = subject.trainer()
    job = subject.job(subject.cell())
    for modality in subject.frozen:  # as the builder does, in this process
        reads = trainer.model.item_encoder.reads[modality]
        build_features(feature_job(job, trainer.method, modality, subject.specs[modality], reads))
    cached = subject.trainer(subject.cell(cached=True))
    items = subject.items(trainer)
    model, tables = trainer.model.eval(), subject.items(cached).states or {}
    for modality in subject.frozen:
        computed = named_tensors(model.states(modality, items))
        for name, stored in named_tensors(tables[modality]).items():
            expect_close(
                stored.float(),
                computed[name].float(),
                f"cached {modality} states, of the fresh encoder, differ from those of the method's encoder",
                atol=HALF,
                rtol=HALF,
            )
    _compare_step(subject, trainer, cached)
    training = subject.train(subject.cell(cached=True))
    if training.error is not None:
        raise ContractError(f"training on cached states: {training.error}")


def _compare_step(subject: Subject, trainer: Trainer, cached: Trainer) -> None:
    """Loss and gradients of one batch: on the encoders, and on their states without rounding."""
    batch = subject.batch(trainer)
    with torch.no_grad():
        states = {modality: trainer.model.train().states(modality, batch.items) for modality in subject.frozen}
    losses, gradients = [], []
    for each, items in ((trainer, batch.items), (cached, replace(batch.items, states=states))):
        torch.manual_seed(0)
        loss = total_loss(each.method, each.model.train(), replace(batch, items=items))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in each.model.named_parameters() if p.grad is not None})
    expect_close(
        losses[1], losses[0], "the loss on cached states differs from the loss on the encoders", atol=1e-6, rtol=1e-6
    )
    if gradients[0].keys() != gradients[1].keys():
        raise ContractError("on cached states, other parameters train than on the encoders")
    for name, gradient in gradients[0].items():
        expect_close(
            gradients[1][name],
            gradient,
            f"the gradient of '{name}' on cached states differs from that on the encoders",
            atol=1e-6,
            rtol=1e-4,
        )


def cache_key_names_what_is_read(subject: Subject) -> None:
    """``reads``, the key of a feature cache, says all that the method reads of its encoders, for all of its options.

    A cache is looked up by its encoder and the ``reads`` of the item encoder. If an option changed the states in any
    other way, cells with that option would read the cache of another one.
    """
    _require_frozen_encoders(subject)
    for options in ({}, *subject.alternatives):
        trainer = with_options(subject, options).trainer()
        items, model = subject.items(trainer), trainer.model.eval()
        with torch.no_grad():
            for modality in subject.frozen:
                reads = model.item_encoder.reads[modality]
                fresh = named_tensors(_fresh(subject.fresh_views[modality], reads, items))
                if not all(
                    torch.equal(kept, fresh[name])
                    for name, kept in named_tensors(model.states(modality, items)).items()
                ):
                    raise ContractError(
                        f"with {options or 'these options'}, the {modality} states are not those that `reads` names, "
                        "so the feature cache would return the states of other options"
                    )


def _fresh(view: EncoderView, reads: Reads, items: Items) -> States:
    return view.encode(reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image)


def _require_frozen_encoders(subject: Subject) -> None:
    if not subject.frozen:
        raise NotApplicable("the method trains through its encoders, or has none")
