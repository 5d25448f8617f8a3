"""The training loop: seeds, early stopping, precision, checkpointing, and which epoch's ranks are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.task import evaluate, ranking
from tpme.bench.task.batches import TrainBatches
from tpme.bench.train import epochs
from tpme.bench.train.epochs import DivergedError
from tpme.bench.train.loop import Trainer
from tpme.bench.train.step import forward
from tpme.methods.base import Method, MethodConfig, Stage, StepState

MakeTrainer = Callable[..., Trainer]


def state(trainer: Trainer) -> dict[str, Tensor]:
    return trainer.model.state_dict()


def same(a: Trainer, b: Trainer) -> bool:
    """Bit for bit: weights, losses, ranks."""
    one, other = state(a), state(b)
    return (
        all(torch.equal(one[name], other[name]) for name in one)
        and [epoch.loss for epoch in a.outcome.epochs] == [epoch.loss for epoch in b.outcome.epochs]
        and np.array_equal(a.outcome.test_ranks, b.outcome.test_ranks)
    )


def trained(make_trainer: MakeTrainer, *args: Any, **settings: Any) -> Trainer:
    trainer = make_trainer(*args, **settings)
    trainer.run()
    return trainer


def ranks_now(trainer: Trainer, split: str = "test") -> Any:
    """Ranks of the model as it is now."""
    trainer.model.eval()
    vectors = evaluate.item_matrix(trainer.encode, trainer.store, trainer.device)
    return evaluate.rank_split(trainer.model, vectors, getattr(trainer.dataset, split))


def scripted(monkeypatch: pytest.MonkeyPatch, recalls: Sequence[float]) -> None:
    """Validation finds these values, epoch by epoch."""
    values = iter(recalls)
    monkeypatch.setattr(epochs, "recall_and_ndcg", lambda _ranks, k: (next(values), 0.5))


# --- seeds and data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["fft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("id", "lora", "iisan"))]
)
def test_equal_seeds_give_equal_runs_bit_for_bit(make_trainer: MakeTrainer, method: str) -> None:
    first = trained(make_trainer, method, seed=3)
    assert same(first, trained(make_trainer, method, seed=3))
    assert not same(first, trained(make_trainer, method, seed=4))


def test_training_lowers_the_loss(make_trainer: MakeTrainer) -> None:
    trainer = trained(make_trainer, "id", epochs=8, max_steps_per_epoch=None, lr=1e-2)
    losses = [epoch.loss for epoch in trainer.outcome.epochs]
    assert losses[-1] < losses[0] - 0.3


def test_every_method_sees_the_same_users_in_the_same_order(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    assemble = TrainBatches._assemble

    def noting(self: TrainBatches, order: Any, step: int) -> Any:
        seen.append([step, *order])
        return assemble(self, order, step)

    monkeypatch.setattr(TrainBatches, "_assemble", noting)
    orders = []
    for name in ("frozen", "fft", "id"):
        trained(make_trainer, name)
        orders.append(seen.copy())
        seen.clear()
    assert orders[0] == orders[1] == orders[2]
    assert [step for step, *_ in orders[0]] == [0, 1, 0, 1]
    assert orders[0][0] != orders[0][2]  # another order in another epoch


@pytest.mark.parametrize(("limit", "steps"), [(None, 3), (1, 1), (2, 2), (9, 3)])
def test_steps_of_an_epoch(make_trainer: MakeTrainer, limit: int | None, steps: int) -> None:
    trainer = trained(make_trainer, "frozen", max_steps_per_epoch=limit)
    assert [epoch.steps for epoch in trainer.outcome.epochs] == [steps, steps]
    assert trainer.outcome.step_epoch == [1] * steps + [2] * steps
    assert len(trainer.outcome.step_s) == 2 * steps
    assert trainer.state.step == trainer.state.schedule.total_steps == 2 * steps


# --- time -----------------------------------------------------------------------------------------------------------


def test_training_time_holds_training_alone(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.1, 0.2])
    trainer = trained(make_trainer, "frozen", epochs=3)
    phases = [(phase.kind, phase.name) for phase in trainer.phases.phases]
    assert phases == [
        ("train", "epoch 1"),
        ("validate", "epoch 1"),
        ("rank", "epoch 1"),
        ("train", "epoch 2"),
        ("validate", "epoch 2"),
        ("train", "epoch 3"),
        ("validate", "epoch 3"),
        ("rank", "epoch 3"),
    ]
    trains = [phase.wall_s for phase in trainer.phases.phases if phase.kind == "train"]
    assert [epoch.train_s for epoch in trainer.outcome.epochs] == trains
    for number, epoch in enumerate(trainer.outcome.epochs, start=1):
        steps = [s for s, e in zip(trainer.outcome.step_s, trainer.outcome.step_epoch, strict=True) if e == number]
        assert 0 < sum(steps) <= epoch.train_s


# --- which epoch is kept --------------------------------------------------------------------------------------------


def test_training_stops_after_epochs_without_improvement(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.9])
    outcome = trained(make_trainer, "frozen", epochs=10, patience=2).outcome
    assert [epoch.index for epoch in outcome.epochs] == [1, 2, 3, 4]  # equal is no improvement
    assert (outcome.best_epoch, outcome.best_recall) == (2, 0.3)


def test_an_improvement_starts_the_count_again(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.5, 0.1, 0.6, 0.1, 0.2, 0.9])
    outcome = trained(make_trainer, "frozen", epochs=10, patience=2).outcome
    assert len(outcome.epochs) == 5
    assert outcome.best_epoch == 3


def test_the_test_ranks_are_those_of_the_best_epoch(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to ranking again with the model as it was then: a run that ends with that epoch."""
    scripted(monkeypatch, itertools.chain([0.1, 0.3, 0.2], itertools.repeat(0.1)))  # type: ignore[arg-type]
    outcome = trained(make_trainer, "fft", epochs=3, lr=1e-2).outcome
    monkeypatch.undo()
    after = {}
    for number in (1, 2, 3):
        after[number] = ranks_now(trained(make_trainer, "fft", epochs=number, lr=1e-2))
    assert np.array_equal(outcome.test_ranks, after[2])
    assert not np.array_equal(after[1], after[2])
    assert not np.array_equal(after[3], after[2])


def test_validation_is_of_the_validation_targets(make_trainer: MakeTrainer) -> None:
    trainer = trained(make_trainer, "fft", epochs=1, max_steps_per_epoch=None)
    (epoch,) = trainer.outcome.epochs
    ranks = ranks_now(trainer, "valid")
    assert epoch.valid_recall_10 == pytest.approx(float((ranks <= 10).mean()))
    assert epoch.valid_ndcg_10 == pytest.approx(float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()))


# --- rows without encoders ------------------------------------------------------------------------------------------


def test_popularity_trains_nothing_and_ranks_by_counts(make_trainer: MakeTrainer) -> None:
    trainer = trained(make_trainer, "popularity")
    outcome = trainer.outcome
    assert (outcome.epochs, outcome.step_s, outcome.best_epoch, outcome.trainable_max) == ([], [], None, 0)
    assert [phase.kind for phase in trainer.phases.phases] == ["validate", "rank"]
    dataset, test = trainer.dataset, trainer.dataset.test
    counts = np.bincount(dataset.train_slots[dataset.train_slots > 0], minlength=dataset.manifest.items + 1)
    for user, target in enumerate(test.target):
        rivals = set(range(1, dataset.manifest.items + 1)) - set(test.history[user].tolist()) - {int(target)}
        expected = 1 + sum(counts[rival] >= counts[target] for rival in rivals)
        if target in test.history[user]:
            expected = dataset.manifest.items
        assert outcome.test_ranks is not None
        assert outcome.test_ranks[user] == expected


def test_the_id_row_holds_a_vector_an_item_and_no_encoder(make_trainer: MakeTrainer) -> None:
    trainer = trained(make_trainer, "id")
    groups = trainer.model.parameter_groups()
    assert set(groups) == {"recommender", "method"}
    assert [p.shape for p in groups["method"]] == [(trainer.dataset.manifest.items + 1, 16)]
    assert not trainer.model.views
    assert float(trainer.model.item_encoder.table.weight[0].detach().abs().sum()) == 0  # type: ignore


# --- precision and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fft", "iisan"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_about_the_same(make_trainer: MakeTrainer, method: str, precision: str) -> None:
    whole = trained(make_trainer, method, epochs=1, dropout=0.0, modalities=("text", "image"))
    half = trained(make_trainer, method, epochs=1, dropout=0.0, modalities=("text", "image"), precision=precision)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.outcome.epochs[0].loss == pytest.approx(whole.outcome.epochs[0].loss, rel=0.02)
    assert half.outcome.epochs[0].loss != whole.outcome.epochs[0].loss  # it was used at all


def test_no_score_ties_because_of_half_precision(make_trainer: MakeTrainer) -> None:
    """Ranks of a bf16 run are computed in float32: a tie counts against the model."""
    trainer = make_trainer("id", precision="bf16")
    seen, score = [], ranking._scores

    def look(users: Tensor, items: Tensor, buffer: Tensor) -> Tensor:
        seen.append((users @ items.T).dtype)
        return score(users, items, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_scores", look)
        trainer.run()
    assert set(seen) == {torch.float32}


def kept_bytes(trainer: Trainer) -> int:
    """Bytes that the forward pass of one step keeps for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.model.train()
    batch = next(iter(trainer.loader.epoch(1)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(trainer.method, trainer.model, batch)
    assert output.loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "method", ["fft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "adapter", "prompt"))]
)
def test_checkpointing_changes_the_memory_and_nothing_else(make_trainer: MakeTrainer, method: str) -> None:
    plain = make_trainer(method, modalities=("text", "image"))
    checkpointed = make_trainer(method, modalities=("text", "image"), activation_checkpointing=True)
    assert kept_bytes(checkpointed) < 0.6 * kept_bytes(plain)
    for trainer in (plain, checkpointed):
        torch.manual_seed(5)  # of dropout
        trainer.run()
    assert [epoch.loss for epoch in checkpointed.outcome.epochs] == pytest.approx(
        [epoch.loss for epoch in plain.outcome.epochs], rel=1e-5
    )
    for name, value in state(plain).items():
        torch.testing.assert_close(state(checkpointed)[name], value, rtol=1e-3, atol=1e-5)


def test_the_protocols_give_the_same_loss_without_dropout(make_trainer: MakeTrainer) -> None:
    suite, paper = (make_trainer("iisan", dropout=0.0, protocol=protocol, epochs=1) for protocol in ("suite", "paper"))
    batches = [next(iter(trainer.loader.epoch(1))) for trainer in (suite, paper)]
    assert len(batches[0].items) < len(batches[1].items) == 20 * 11
    for trainer in (suite, paper):
        trainer.run()
    assert paper.outcome.epochs[0].loss == pytest.approx(suite.outcome.epochs[0].loss, rel=1e-5)


# --- divergence -----------------------------------------------------------------------------------------------------


class Diverging(Method):
    """Its loss is NaN from the third step on."""

    def losses(self, outputs: Any) -> dict[str, Tensor]:
        self.steps = getattr(self, "steps", 0) + 1
        return {"task": outputs["task"].loss * (float("nan") if self.steps >= 3 else 1.0)}


@pytest.mark.parametrize(("every", "steps"), [(1, 3), (4, 4), (50, 6)])
def test_a_loss_that_is_not_finite_ends_the_run(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, every: int, steps: int
) -> None:
    monkeypatch.setattr(epochs, "CHECK_EVERY_STEPS", every)
    method = Diverging(MethodConfig())
    trainer = make_trainer(method, users_per_batch=10, max_steps_per_epoch=None)
    with pytest.raises(DivergedError, match="not finite at step 3 of epoch 1") as error:
        trainer.run()
    assert (error.value.epoch, error.value.step) == (1, 3)
    assert method.steps == steps
    assert trainer.outcome.test_ranks is None


def test_passes_that_a_later_stage_adds_are_not_recomputed(make_trainer: MakeTrainer) -> None:
    class Later(Method):
        def begin_stage(self, state: StepState) -> None:
            self.names = ("task",) if state.stage.name == "one" else ("thin", "full")

        def stages(self) -> tuple[Stage, ...]:
            return Stage("one", 0.5), Stage("two", 0.5)

        def passes(self) -> tuple[str, ...]:
            return self.names

    trainer = make_trainer(Later(Method.Config()), activation_checkpointing=True)
    with pytest.raises(UserError, match=r"has 2 passes a step \(thin, full\)"):
        trainer.run()
    assert [epoch.stage for epoch in trainer.outcome.epochs] == ["one"]
