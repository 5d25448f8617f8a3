"""What a method's own procedure is made of: subsets of users, forks, kept parts, phases, the choice of the model."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tpme.bench.task.batches import TrainBatches
from tpme.bench.task.items import Items
from tpme.bench.task.recommender import Recommender
from tpme.bench.train import epochs as measured
from tpme.bench.train.facts import epoch_time
from tpme.bench.train.kept import Kept
from tpme.bench.train.loop import Trainer
from tpme.methods.base import Context, Method, MethodConfig, PassOutput, Result, Stage, StepState, Validation
from tpme.methods.registry import create

MakeTrainer = Callable[..., Trainer]
USERS = 60


class Toy(Method):
    """Trains the recommender's own parts; subclasses have a procedure of their own."""

    def __init__(self) -> None:
        super().__init__(MethodConfig())
        self.log: list[Any] = []


class Driven(Toy):
    """Its procedure is a function of the test."""

    def __init__(self, procedure: Callable[[Context], Any]) -> None:
        super().__init__()
        self.procedure = procedure

    def run(self, context: Context) -> None:
        self.log.append(self.procedure(context))


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kinds(trainer: Trainer) -> list[tuple[str, str]]:
    return [(phase.kind, phase.name) for phase in trainer.phases.phases]


def scripted(monkeypatch: pytest.MonkeyPatch, recalls: list[float]) -> None:
    """Validation finds these values, one after the other."""
    values = iter(recalls)
    monkeypatch.setattr(measured, "recall_and_ndcg", lambda _ranks, k: (next(values), 0.5))


@pytest.fixture
def seen_users(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The users of every batch that is assembled."""
    seen: list[list[int]] = []
    assemble = TrainBatches._assemble

    def noting(self: TrainBatches, order: Any, step: int) -> Any:
        seen.append([int(user) for user in order[step * self.size : (step + 1) * self.size]])
        return assemble(self, order, step)

    monkeypatch.setattr(TrainBatches, "_assemble", noting)
    return seen


# --- subsets of the users -------------------------------------------------------------------------------------------


def test_training_on_some_users_has_their_batches_and_their_schedule(
    make_trainer: MakeTrainer, seen_users: list[list[int]]
) -> None:
    class Looking(Driven):
        def before_step(self, state: StepState) -> None:
            self.log.append((state.schedule.epochs, state.schedule.steps_per_epoch, state.epoch, state.step))

    some = {3, 5, 8, *range(20, 48)}
    method = Looking(lambda context: context.train(epochs=3, users=some))
    trainer = make_trainer(method, max_steps_per_epoch=None)
    whole = trainer.state.schedule
    trainer.run()
    assert [set(a) | set(b) for a, b in zip(seen_users[::2], seen_users[1::2], strict=True)] == [some] * 3
    assert [len(users) for users in seen_users] == [20, 11] * 3
    assert method.log[:-1] == [(3, 2, 1 + step // 2, step) for step in range(6)]
    assert [epoch.steps for epoch in trainer.outcome.epochs] == [2, 2, 2]
    assert trainer.state.schedule == whole
    assert len(trainer.loader) == 3


def test_batches_are_of_the_users_alone(make_trainer: MakeTrainer, seen_users: list[list[int]]) -> None:
    trainer = make_trainer(Toy())
    some = np.arange(5, 33)
    slots = [len(batch.slot) for batch in trainer.batches(some)]
    assert slots == [20, 8]
    assert sorted(user for users in seen_users for user in users) == list(some)
    assert np.array_equal(trainer.users, np.arange(USERS))


@pytest.mark.parametrize("users", [[], [1, 1], [-1], [USERS], np.array([2, 3, 2])])
def test_users_that_are_none_are_refused(make_trainer: MakeTrainer, users: Any) -> None:
    trainer = make_trainer(Toy())
    for use in (trainer.train, trainer.batches):
        with pytest.raises(ValueError, match="row numbers of training users, 0 to 59, each once"):
            use(users=users)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        trainer.train(epochs=0)


def test_losses_during_such_training_are_of_its_users(make_trainer: MakeTrainer, seen_users: list[list[int]]) -> None:
    class Projecting(Driven):
        def after_step(self, state: StepState, context: Context) -> None:
            with torch.no_grad():
                self.log += [float(loss) for loss in context.training_losses(1)]

    trainer = make_trainer(Projecting(lambda context: context.train(epochs=2, users=range(10))))
    trainer.run()
    assert all(user < 10 for users in seen_users for user in users)


# --- kinds of training ----------------------------------------------------------------------------------------------


def test_search_and_rounds_are_no_training_time(make_trainer: MakeTrainer) -> None:
    def procedure(context: Context) -> None:
        context.train(epochs=2, kind="search")
        context.train(epochs=1, kind="round")
        context.train(epochs=2)

    trainer = make_trainer(Driven(procedure))
    trainer.run()
    assert kinds(trainer)[:3] == [("search", "epoch 1"), ("search", "epoch 2"), ("round", "epoch 3")]
    trains = [phase for phase in trainer.phases.phases if phase.kind == "train"]
    assert [phase.name for phase in trains] == ["epoch 1", "epoch 2"]
    assert [epoch.train_s for epoch in trainer.outcome.epochs] == [phase.wall_s for phase in trains]
    assert [epoch.index for epoch in trainer.outcome.epochs] == [1, 2]
    assert trainer.outcome.step_epoch == [1, 1, 2, 2]
    assert trainer.state.epoch == 5
    memory = trainer.phases.training_memory(trainer.outcome.first_phase).host_rss_bytes
    assert memory.value == max(phase.memory.host_rss_bytes.value or 0 for phase in trains) or not memory.valid


def test_a_phase_within_a_phase_is_part_of_it(make_trainer: MakeTrainer) -> None:
    def procedure(context: Context) -> None:
        with context.phase("search", "trial"):
            fork = context.fork(Toy(), 3)
            fork.train(1, kind="search")
            fork.validate()
            with pytest.raises(RuntimeError, match="'epoch 1' begins while 'trial' is open"):
                fork.train(1)

    trainer = make_trainer(Driven(procedure))
    trainer.run()
    assert kinds(trainer) == [("search", "trial"), ("validate", ""), ("rank", "")]


def test_nothing_joins_a_training_phase(make_trainer: MakeTrainer) -> None:
    class Late(Toy):
        trainer: Trainer

        def on_epoch_end(self, state: StepState) -> None:
            for late in (lambda: self.trainer.fork(Toy(), 1), self.trainer.validate):
                with pytest.raises(RuntimeError, match="begins while 'epoch 1' is open"):
                    late()
            self.log.append("refused")

    method = Late()
    method.trainer = make_trainer(method, epochs=1)
    method.trainer.run()
    assert method.log == ["refused"]


# --- forks and the choice of the model ------------------------------------------------------------------------------


def test_a_fork_is_a_fresh_cell_of_its_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(Toy())
    before = weights(trainer)
    same, other = trainer.fork(Toy(), trainer.seed), trainer.fork(Toy(), 99)
    assert equal(weights(same), before)
    assert not equal(weights(other), before)
    other.train()
    assert equal(weights(trainer), before)
    assert trainer.outcome.epochs == []
    assert len(other.outcome.epochs) == 2
    assert other.seed == 99
    assert kinds(trainer)[0] == ("adapt", "fork")


@pytest.mark.parametrize("adopted_first", [False, True])
def test_an_adopted_fork_is_the_cell(make_trainer: MakeTrainer, adopted_first: bool) -> None:
    """Bit for bit what the method does that was adopted; the first model is given back."""
    gone: list[Callable[[], Any]] = []

    def procedure(context: Context) -> None:
        gone.append(weakref.ref(context.state.model))
        fork = context.fork(create("bitfit", {}), context.seed)
        if adopted_first:
            context.adopt(fork)
            assert context.state is fork.state
            context.train()
        else:
            fork.train()
            context.adopt(fork)

    plain, trainer = make_trainer("bitfit", lr=1e-2), make_trainer(Driven(procedure), lr=1e-2)
    plain.run()
    trainer.run()
    assert equal(weights(trainer), weights(plain))
    assert [epoch.loss for epoch in trainer.outcome.epochs] == [epoch.loss for epoch in plain.outcome.epochs]
    assert np.array_equal(trainer.outcome.test_ranks, plain.outcome.test_ranks)
    assert trainer.outcome.best_epoch == plain.outcome.best_epoch
    assert type(trainer.method) is type(plain.method)
    gc.collect()
    assert gone[0]() is None


def test_a_validation_that_is_best_keeps_its_ranks(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def procedure(context: Context) -> list[Validation]:
        found = []
        for epochs in (1, 1, 1):
            context.train(epochs, kind="round")
            found.append(context.validate())
            ranks.append(context.outcome.test_ranks)  # type: ignore[attr-defined]
        return found

    ranks: list[Any] = []
    scripted(monkeypatch, [0.2, 0.4, 0.3])
    method = Driven(procedure)
    trainer = make_trainer(method, lr=1e-2)
    trainer.run()
    assert method.log[0] == [Validation(0.2, 0.5), Validation(0.4, 0.5), Validation(0.3, 0.5)]
    assert trainer.outcome.test_ranks is ranks[1] is ranks[2]
    assert ranks[0] is not ranks[1]
    assert trainer.outcome.best_epoch is None


# --- stages ---------------------------------------------------------------------------------------------------------


class Pruned(Toy):
    """Estimates with everything, then trains the heads alone; estimation is slow."""

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("estimation", 0.5), Stage("pruned", 0.5))

    def begin_stage(self, state: StepState) -> None:
        state.model.sequence.requires_grad_(state.stage.name == "estimation")

    def before_step(self, state: StepState) -> None:
        time.sleep(0.2 if state.stage.name == "estimation" else 0.0)


def test_the_last_stage_is_what_counts(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.9, 0.8, 0.7, 0.1, 0.3, 0.2])
    trainer = make_trainer(Pruned(), epochs=6)
    outcome = trainer.run()
    assert [epoch.stage for epoch in outcome.epochs] == ["estimation"] * 3 + ["pruned"] * 3
    assert (outcome.best_epoch, outcome.best_recall) == (5, 0.3)
    assert (outcome.earlier_epochs, outcome.warmup_epochs) == (3, 4)
    times = [epoch.train_s for epoch in outcome.epochs]
    assert min(times[:3]) > 0.4
    assert epoch_time(outcome).value == np.median(times[4:])
    assert "stage 'pruned' after 1 warm-up epoch(s)" in epoch_time(outcome).source
    counted = [phase.name for phase in trainer.phases.phases[outcome.first_phase :] if phase.kind == "train"]
    assert counted == ["pruned epoch 4", "pruned epoch 5", "pruned epoch 6"]
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trainable < outcome.trainable_max


def test_the_record_of_a_pruned_row(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    """Memory that only the first stage took is not in M; all that trained is in the total."""
    body = """
    def stages(self):
        return Stage("wide", 0.25), Stage("narrow", 0.75)

    def begin_stage(self, state):
        self.held = None
        state.model.sequence.requires_grad_(state.stage.name == "wide")

    def before_step(self, state):
        if state.stage.name == "wide" and not next(state.model.parameters()).is_meta:
            self.held = torch.ones(80_000_000)
    """
    harness.write_method(tmp_path / "methods", "pruned", body)
    matrix = world.matrix(["pruned"], modalities=["text"], training={"epochs": 4})
    result = world.tell(matrix, tmp_path / "cell", methods_path=(tmp_path / "methods",))
    assert result.failure is None
    assert [epoch.stage for epoch in result.epochs] == ["wide", "narrow", "narrow", "narrow"]
    assert (result.warmup_epochs, result.best_epoch in (2, 3, 4)) == (2, True)
    trains = [phase for phase in result.phases if phase.kind == "train"]
    wide, *narrow = (phase.memory.host_rss_bytes.value for phase in trains)
    assert result.training_memory.host_rss_bytes.value == max(narrow) < wide - 200e6
    assert result.all_in_s.value == pytest.approx(sum(phase.wall_s for phase in trains))
    assert result.epoch_time_s.value == pytest.approx(np.median([phase.wall_s for phase in trains[2:]]))
    assert result.parameters.trainable < result.parameters.trainable_max


def test_training_again_goes_on_with_the_same_stage(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def procedure(context: Context) -> None:
        for _ in range(4):
            context.train(1)

    scripted(monkeypatch, [0.1, 0.4, 0.2, 0.3])
    outcome = make_trainer(Driven(procedure)).run()
    assert (len(outcome.epochs), outcome.best_epoch, outcome.warmup_epochs) == (4, 2, 1)


# --- parts that are kept --------------------------------------------------------------------------------------------


def test_a_part_is_done_once(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    """A second trainer on the same folder stands for a second attempt."""
    done: list[str] = []

    def work() -> Result:
        done.append("work")
        time.sleep(0.05)
        return {"weights": torch.randn(3, 2), "draw": random.random(), "name": "x", "sizes": [1, 2]}

    def procedure(context: Context) -> Result:
        before = torch.get_rng_state(), random.getstate()
        result = context.once("search", "trial 1", work)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        return result

    results, spent = [], []
    for seed in (1, 1, 2):
        method = Driven(procedure)
        trainer = make_trainer(method, kept=Kept(tmp_path / str(seed)), seed=seed)
        trainer.run()
        results.append(method.log[0])
        spent.append(trainer.kept.resumed_s)
    first, again, other = results
    assert done == ["work", "work"]
    assert (first["name"], first["sizes"], first["draw"]) == ("x", [1, 2], again["draw"])
    assert torch.equal(first["weights"], again["weights"])
    assert not torch.equal(first["weights"], other["weights"])
    assert spent[0] == spent[2] == 0.0
    assert spent[1] > 0.05


def test_only_what_is_kept_outlasts_a_part(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A best validation within the work is no result of the cell: a later attempt would not have it."""
    scripted(monkeypatch, [0.9, 0.1])

    def procedure(context: Context) -> tuple[int, int]:
        def work() -> Result:
            context.train(2, kind="round")
            return {"recall": context.validate().recall_10}

        context.once("round", "round 1", work)
        return context.state.epoch, context.state.step

    for _ in range(2):
        method = Driven(procedure)
        trainer = make_trainer(method)
        trainer.run()
        assert trainer.outcome.best_recall == 0.1
        assert method.log == [(2, 4)]
        scripted(monkeypatch, [0.9, 0.1])


def test_a_part_draws_the_same_batches_if_the_part_before_it_was_kept(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    """Also outside of parts: where those within were drawn, a later attempt draws none."""

    def drawn(trainer: Trainer) -> list[float]:
        def work() -> dict[str, Any]:
            return {"losses": [float(loss.detach()) for loss in trainer.training_losses(1)]}

        trainer.model.sequence.requires_grad_(False)
        values = [trainer.once("search", name, work)["losses"] for name in ("first", "second")]
        return [*values[1], *(float(loss.detach()) for loss in trainer.training_losses(1))]

    uninterrupted = drawn(make_trainer(Toy(), kept=Kept(tmp_path), dropout=0.0))
    next(tmp_path.glob("second*")).unlink()
    assert drawn(make_trainer(Toy(), kept=Kept(tmp_path), dropout=0.0)) == uninterrupted


def test_the_loss_scale_of_a_part_is_its_own(make_trainer: MakeTrainer) -> None:
    """Else a part after one that was kept would begin with another scale than after one that was done."""
    trainer = make_trainer(Toy())
    scaler, inside = trainer.scaler, []
    trainer.once("round", "one", lambda: inside.append(trainer.scaler) or {})
    assert trainer.scaler is scaler
    assert inside[0] is not scaler


def test_stages_of_one_name_are_refused(make_trainer: MakeTrainer) -> None:
    class Twice(Toy):
        def stages(self) -> tuple[Stage, ...]:
            return Stage(share=0.5), Stage(share=0.5)

    with pytest.raises(ValueError, match="a different name for every stage"):
        make_trainer(Twice()).run()


def test_epoch_and_step_go_on_after_a_part_that_was_kept(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    def procedure(context: Context) -> tuple[int, int]:
        def work() -> Result:
            context.train(2, kind="round")
            return dict(context.state.model.state_dict())

        context.state.model.load_state_dict(context.once("round", "first", work))
        context.train(1)
        return context.state.epoch, context.state.step

    trained = []
    for _ in range(2):
        method = Driven(procedure)
        trainer = make_trainer(method, kept=Kept(tmp_path), dropout=0.0)
        trainer.run()
        trained.append((weights(trainer), trainer.outcome.test_ranks))
        assert method.log == [(3, 6)]
    assert equal(trained[0][0], trained[1][0])
    assert np.array_equal(trained[0][1], trained[1][1])


def test_parts_that_cannot_be_kept_are_refused(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    trainer = make_trainer(Toy(), kept=Kept(tmp_path))
    with pytest.raises(ValueError, match="keeps no training epochs"):
        trainer.once("train", "all", dict)
    trainer.once("search", "one", dict)
    with pytest.raises(ValueError, match=r"once\('one'\) was called before"):
        trainer.once("search", "one", dict)
    with pytest.raises(TypeError, match="JSON"):
        trainer.once("search", "two", lambda: {"model": trainer.model})
    [file] = [path for path in trainer.folder.iterdir() if path.name.startswith("one")]
    file.write_bytes(b"torn")
    again = make_trainer(Toy(), kept=Kept(tmp_path))
    assert again.once("search", "one", lambda: {"done": 1.0}) == {"done": 1.0}
    assert again.kept.damaged == ["one"]


# --- whole procedures -----------------------------------------------------------------------------------------------


class Search(Toy):
    """AutoPEFT in small: short trials of several widths, and the best of them trained in full."""

    def run(self, context: Context) -> None:
        def trial(width: int) -> Result:
            fork = context.fork(create("adapter", {"bottleneck": width}), context.seed)
            fork.train(1, users=context.users[::2], kind="search")
            return {"recall": fork.validate().recall_10, "width": width}

        def tried(width: int) -> Result:
            return context.once("search", f"width {width}", lambda: trial(width))

        best = max((tried(width) for width in (2, 4, 6)), key=lambda found: found["recall"])
        context.adopt(context.fork(create("adapter", {"bottleneck": best["width"]}), context.seed))
        context.train()
        self.log.append(best["width"])


def test_a_search_trains_what_it_chose(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.2, 0.4, 0.3, 0.5, 0.6])
    method = Search()
    trainer = make_trainer(method)
    trainer.run()
    monkeypatch.undo()
    assert method.log == [4]
    assert kinds(trainer)[:3] == [("search", "width 2"), ("search", "width 4"), ("search", "width 6")]
    assert [phase.name for phase in trainer.phases.phases if phase.kind == "train"] == ["epoch 1", "epoch 2"]
    plain = make_trainer(create("adapter", {"bottleneck": 4}))
    plain.run()
    assert equal(weights(trainer), weights(plain))


class Federation(Toy):
    """FedAvg in small: clients are disjoint users; a client keeps its model and optimiser from round to round.

    Args:
        clients: how many there are. rounds: how many rounds, each with one epoch of every client.
    """

    def __init__(self, clients: int, rounds: int) -> None:
        super().__init__()
        self.clients, self.rounds = clients, rounds

    def run(self, context: Context) -> None:
        parts = np.array_split(context.users, self.clients)
        clients = [context.fork(Client(), context.seed) for _ in parts]
        model = context.state.model
        for number in range(1, self.rounds + 1):
            states = []
            with context.phase("round", f"round {number}"):
                for client, users in zip(clients, parts, strict=True):
                    client.state.model.load_state_dict(model.state_dict())
                    client.train(1, users=users, kind="round")
                    states.append(client.state.model.state_dict())
            shares = [len(users) / len(context.users) for users in parts]
            model.load_state_dict(
                {
                    name: sum(share * state[name] for share, state in zip(shares, states, strict=True))
                    if states[0][name].is_floating_point()
                    else states[0][name]
                    for name in states[0]
                }
            )
            self.log.append(context.validate().recall_10)


class Client(Toy):
    """Its optimiser lives as long as it does."""

    kept: torch.optim.Optimizer | None = None

    def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        self.kept = self.kept or super().optimizer(groups, fused=fused)
        return self.kept


def test_one_client_with_all_users_is_plain_training(make_trainer: MakeTrainer) -> None:
    """Bit for bit, with dropout: weights, validation, and the ranks of the best round."""
    method = Federation(clients=1, rounds=3)
    plain, trainer = make_trainer(Toy(), epochs=3, lr=1e-2), make_trainer(method, epochs=3, lr=1e-2)
    plain.run()
    trainer.run()
    assert equal(weights(trainer), weights(plain))
    assert method.log == [epoch.valid_recall_10 for epoch in plain.outcome.epochs]
    assert np.array_equal(trainer.outcome.test_ranks, plain.outcome.test_ranks)
    assert trainer.outcome.epochs == []


def test_clients_train_on_their_own_users(make_trainer: MakeTrainer, seen_users: list[list[int]]) -> None:
    trainer = make_trainer(Federation(clients=3, rounds=2))
    trainer.run()
    assert [sorted(users) for users in seen_users] == [list(range(k, k + 20)) for k in (0, 20, 40)] * 2
    assert [name for kind, name in kinds(trainer) if kind == "round"] == ["round 1", "round 2"]
    assert not [kind for kind, _ in kinds(trainer) if kind == "train"]


# --- encode() and the terms of the loss -----------------------------------------------------------------------------


def test_encode_is_used_everywhere(make_trainer: MakeTrainer) -> None:
    """In training and in evaluation, and the item vectors of a method are those of its ``encode``."""

    class Silent(Toy):
        def encode(self, model: Recommender, items: Items) -> Tensor:
            self.log.append(model.training)
            return 0 * model.encode_items(items)

    method = Silent()
    trainer = make_trainer(method, epochs=1)
    trainer.run()
    assert set(method.log) == {True, False}
    # All items have one score, and ties count against the model.
    assert trainer.outcome.epochs[0].valid_recall_10 == 0.0
    method.log.clear()
    assert len(list(trainer.training_losses(1))) == 1
    assert method.log == [True]


def test_terms_of_the_loss_are_recorded_by_name(make_trainer: MakeTrainer) -> None:
    class Regularised(Toy):
        def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
            task = outputs["task"].loss
            self.log.append(float(task.detach()))
            return {"task": task, "ratio": 0.5 * task, "zero": task.new_zeros(())}

    method = Regularised()
    trainer = make_trainer(method)
    trainer.run()
    for epoch, steps in zip(trainer.outcome.epochs, (method.log[:2], method.log[2:]), strict=True):
        assert list(epoch.losses) == ["task", "ratio", "zero"]
        assert epoch.losses["task"] == pytest.approx(np.mean(steps))
        assert epoch.losses["ratio"] == pytest.approx(np.mean(steps) / 2)
        assert epoch.losses["zero"] == 0.0
        assert epoch.loss == pytest.approx(1.5 * np.mean(steps))
