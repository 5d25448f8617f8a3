"""Checks of a method's training, all of it by the real trainer: every stage, with every hook."""

from __future__ import annotations

import math
import shutil

import torch

from tpme.bench.contract.expect import ContractError, NotApplicable, expect_close
from tpme.bench.contract.subject import Subject, Trained, vectors
from tpme.bench.errors import UserError, one_line
from tpme.bench.task.items import named_tensors
from tpme.bench.task.sequential import SequentialEncoder
from tpme.bench.train.epochs import overrides
from tpme.bench.train.loop import Trainer
from tpme.bench.train.step import forward


def trains_through_all_stages(subject: Subject) -> None:
    """The whole procedure ends well, and every stage has at least one epoch with a finite loss.

    A procedure of rounds alone leaves no epoch in the record.
    """
    trained = subject.first_training
    _require_success(trained)
    method, epochs = trained.trainer.method, trained.trainer.outcome.epochs
    missing = sorted({stage.name for stage in method.stages()} - {epoch.stage for epoch in epochs})
    if missing and trained.watch.trained and (epochs or not overrides(method, "run")):
        raise ContractError(f"stage '{missing[0]}' was not trained")
    if trained.watch.ungrouped:
        name, groups = min(trained.watch.ungrouped.items())
        raise ContractError(f"'{name}' trains, but is in {groups} groups of the optimiser instead of one")


def sequential_encoder_is_the_tasks(subject: Subject) -> None:
    """The sequential encoder belongs to the task: all of it trains, and no method trains another in its place."""
    _require_trainable(subject)
    trained = subject.trained
    sequence = trained.trainer.model.sequence
    if type(sequence) is not SequentialEncoder:
        raise ContractError(f"the method replaces the task's sequential encoder by {type(sequence).__name__}")
    for name, _ in sequence.named_parameters():
        if f"sequence.{name}" not in trained.watch.trained:
            raise ContractError(f"the method does not train the task's sequential encoder: 'sequence.{name}' is frozen")


def trains_under_the_paper_protocol(subject: Subject) -> None:
    """The procedure ends well under protocol ``paper``, too, where every slot is encoded, padding included."""
    _require_success(subject.train(subject.cell(protocol="paper")))


def trains_in_half_precision(subject: Subject) -> None:
    """Under autocast to bfloat16 losses and gradients are finite."""
    _require_success(subject.train(precision="bf16"))


def loss_falls(subject: Subject) -> None:
    """Ten epochs of training without dropout lower the task's loss on the first batch."""
    _require_trainable(subject)
    before = _loss(subject.trainer())
    trained = subject.train(epochs=10, dropout=0.0)
    _require_success(trained)
    after = _loss(trained.trainer)
    if not after < before:
        raise ContractError(f"the training does not lower the task's loss: {before:.4f} before, {after:.4f} after it")


def gradients_reach_what_trains(subject: Subject) -> None:
    """The sum of the method's losses gives every parameter that trains a gradient that is not zero.

    Exempt are biases of keys: one vector added to all keys changes no attention weight, so their gradient is rounding.
    """
    watch = subject.trained.watch
    keys = [f"encoders.{m}.{name}" for m, view in subject.fresh_views.items() for name in view.projections("key")]
    unreached = sorted(
        name
        for name in watch.trained - watch.reached
        if not (name.endswith("bias") and any(name.startswith(f"{key}.") for key in keys))
    )
    if unreached:
        raise ContractError(f"no gradient reaches '{unreached[0]}' ({len(unreached)} of {len(watch.trained)} in all)")


def frozen_parameters_stay(subject: Subject) -> None:
    """The whole procedure keeps every parameter and buffer bit for bit, unless it trains or is in state()."""
    trained = subject.trained
    stored = trained.trainer.method.state(trained.trainer.model).keys()
    moved = sorted(trained.watch.moved() - trained.watch.trained - stored)
    if moved:
        raise ContractError(f"the training changes '{moved[0]}', which neither trains nor is in state()")


def encoders_learn_unless_frozen(subject: Subject) -> None:
    """After training, hidden states differ from those of the fresh encoders; of a frozen encoder they are the same.

    Where a method overrides ``encode``, they may be a part of what it computes, so only frozen encoders are compared.
    """
    trainer = subject.trained.trainer
    method, model = trainer.method, trainer.model
    if not subject.used:
        raise NotApplicable("the method uses no encoder")
    items, frozen = subject.items(trainer), method.frozen_encoders(subject.used)  # a search may leave more frozen
    with torch.no_grad():
        model.eval()
        for modality, reads in model.item_encoder.reads.items():
            if modality not in frozen and overrides(method, "encode"):
                continue
            given = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
            fresh = named_tensors(subject.fresh_views[modality].encode(reads, **given))["states"]
            after = named_tensors(model.states(modality, items))["states"]
            if modality in frozen and not torch.equal(after, fresh):
                raise ContractError(f"the {modality} encoder is frozen, but training changes its hidden states")
            if method.baseline and not torch.equal(after, fresh):
                raise ContractError(
                    f"it says baseline, which adapts no encoder, but changes the {modality} encoder's states"
                )
            adapted = modality not in frozen and not method.baseline
            if adapted and torch.allclose(after, fresh):
                raise ContractError(
                    f"the {modality} encoder gives the same hidden states after training as before; if it is not "
                    "adapted, declare that with decoupled, frozen_encoders() or baseline"
                )


def training_is_reproducible(subject: Subject) -> None:
    """A second training with the same seed gives the same item vectors, bit for bit."""
    again = subject.train()
    _require_success(again)
    if not torch.equal(_vectors(subject, again), _vectors(subject, subject.trained)):
        raise ContractError("two trainings with the same seed give different item vectors")


def resuming_changes_nothing(subject: Subject) -> None:
    """An attempt that finds the parts of the procedure, or all but the last, ends as the one that has done them."""
    kept = subject.trained.trainer.kept.folder
    parts = sorted(kept.glob("*.safetensors"), key=lambda part: part.stat().st_mtime_ns)
    if not parts:
        raise NotApplicable("the procedure keeps no parts")
    for finished in (parts, parts[:-1]):
        trainer = subject.trainer()
        for part in finished:
            shutil.copy2(part, trainer.folder)
        trainer.run()
        found = vectors(trainer.method, trainer.model, subject.items(trainer))
        if not torch.equal(found, _vectors(subject, subject.trained)):
            raise ContractError(
                f"resumed after {len(finished)} of {len(parts)} parts, it ends with other item vectors: what follows "
                "once() may use only what the work has returned"
            )


def checkpointing_changes_nothing(subject: Subject) -> None:
    """With activation checkpointing, the same training gives the same item vectors."""
    try:
        checkpointed = subject.train(activation_checkpointing=True)
        if isinstance(checkpointed.error, UserError):
            raise checkpointed.error
    except UserError as error:
        raise NotApplicable(f"refused: {error}") from None
    _require_success(checkpointed)
    expect_close(
        _vectors(subject, checkpointed),
        _vectors(subject, subject.trained),
        "item vectors differ when trained with activation checkpointing",
    )


def compiled_equals_eager(subject: Subject) -> None:
    """It trains through torch.compile, and compiled item vectors equal those of the same model run eagerly."""
    _require_trainable(subject)
    try:
        compiled = subject.train(compile=True, blocks=1)
    except UserError as error:
        raise NotApplicable(f"refused: {error}") from None
    _require_success(compiled)
    found = _vectors(subject, compiled)
    with torch.compiler.set_stance("force_eager"):
        eager = _vectors(subject, compiled)
    expect_close(found, eager, "compiled item vectors differ from eager ones")


def _require_trainable(subject: Subject) -> None:
    if not subject.trained.watch.trained:
        raise NotApplicable("nothing trains")


def _require_success(trained: Trained) -> None:
    if trained.error is not None:
        raise ContractError(one_line(trained.error))
    if trained.watch.broken:
        raise ContractError(f"the gradient of '{min(trained.watch.broken)}' is not finite")
    if not all(epoch.loss is not None and math.isfinite(epoch.loss) for epoch in trained.trainer.outcome.epochs):
        raise ContractError("a loss is not finite")


def _vectors(subject: Subject, trained: Trained) -> torch.Tensor:
    return vectors(trained.trainer.method, trained.trainer.model, subject.items(trained.trainer))


@torch.no_grad()
def _loss(trainer: Trainer) -> float:
    """The task's loss of the first batch, in eval mode."""
    return float(forward(trainer.method, trainer.model.eval(), next(trainer.batches())).loss)
