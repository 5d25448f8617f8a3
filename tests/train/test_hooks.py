"""Every hook of ``methods/base.py``: when it is called, and with what."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpme.bench.record import LearningRates
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.loop import Trainer
from tpme.methods.base import Context, Method, MethodConfig, PassOutput, Stage, StepState

MakeTrainer = Callable[..., Trainer]
STEPS = 2


class Toy(Method):
    """Trains the recommender's own parts, and says what happens to it."""

    def __init__(self) -> None:
        super().__init__(MethodConfig())
        self.log: list[tuple[Any, ...]] = []


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def test_the_order_of_all_hooks(make_trainer: MakeTrainer) -> None:
    class Logging(Toy):
        def before_training(self, context: Context) -> None:
            self.log.append(("before_training", context.state.epoch, context.state.step))

        def run(self, context: Context) -> None:
            self.log.append(("run",))
            context.train()

        def begin_stage(self, state: StepState) -> None:
            self.log.append(("begin_stage", state.stage.name))

        def param_groups(self, model: Recommender, lr: LearningRates) -> list[dict[str, Any]]:
            self.log.append(("param_groups",))
            return super().param_groups(model, lr)

        def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
            self.log.append(("optimizer",))
            return super().optimizer(groups, fused=fused)

        def before_step(self, state: StepState) -> None:
            self.log.append(("before_step", state.epoch, state.step))

        def begin_pass(self, name: str, model: Recommender) -> None:
            self.log.append(("begin_pass", name, model.training))

        def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
            self.log.append(("losses", *outputs))
            return super().losses(outputs)

        def after_backward(self, state: StepState) -> None:
            self.log.append(("after_backward", state.step))

        def after_step(self, state: StepState, context: Context) -> None:
            self.log.append(("after_step", state.step, context.state is state))

        def on_epoch_end(self, state: StepState) -> None:
            self.log.append(("on_epoch_end", state.epoch, state.step))

    method = Logging()
    make_trainer(method).run()

    def step(epoch: int, number: int) -> list[tuple[Any, ...]]:
        return [
            ("before_step", epoch, number),
            ("begin_pass", "task", True),
            ("losses", "task"),
            ("after_backward", number),
            ("after_step", number, True),
        ]

    assert method.log == [
        ("before_training", 0, 0),
        ("run",),
        ("begin_stage", ""),
        ("param_groups",),
        ("optimizer",),
        *step(1, 0),
        *step(1, 1),
        ("on_epoch_end", 1, 2),
        *step(2, 2),
        *step(2, 3),
        ("on_epoch_end", 2, 4),
    ]


def test_before_training_sees_losses_outside_the_training_time(make_trainer: MakeTrainer) -> None:
    class Estimating(Toy):
        def before_training(self, context: Context) -> None:
            before = weights(context.state.model)
            losses = list(itertools.islice(context.training_losses(5), 10))
            self.log.append(tuple(float(loss.detach()) for loss in losses))
            losses[0].backward()
            assert all(parameter.grad is not None for parameter in context.state.model.sequence.parameters())
            context.state.model.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(before, weights(context.state.model), strict=True))

    method = Estimating()
    trainer = make_trainer(method, dropout=0.0)
    trainer.run()
    (losses,) = method.log
    # More than an epoch of two batches; then they come round again.
    assert len(losses) == 5
    assert len(set(losses)) == 2
    assert losses[4] == losses[2] == losses[0]
    kinds = [phase.kind for phase in trainer.phases.phases]
    assert kinds[:2] == ["estimate", "train"]
    assert kinds.count("estimate") == 1


def test_later_calls_get_the_next_batches(make_trainer: MakeTrainer) -> None:
    class Projecting(Toy):
        def after_step(self, state: StepState, context: Context) -> None:
            with torch.no_grad():
                self.log += [float(loss) for loss in context.training_losses(1)]

    method = Projecting()
    make_trainer(method, dropout=0.0, lr=1e-9, epochs=1).run()  # a rate at which nothing moves
    assert method.log[0] != pytest.approx(method.log[1], rel=1e-4)


def test_before_training_has_no_phase_where_it_is_not_used(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(Toy())
    trainer.run()
    assert "estimate" not in [phase.kind for phase in trainer.phases.phases]


def test_passes_and_losses(make_trainer: MakeTrainer) -> None:
    class TwoPasses(Toy):
        def passes(self) -> tuple[str, ...]:
            return ("plain", "shifted")

        def begin_pass(self, name: str, model: Recommender) -> None:
            with torch.no_grad():
                model.item_encoder.heads["text"].bias.fill_(1.0 if name == "shifted" else 0.0)  # type: ignore[index]

        def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
            assert list(outputs) == ["plain", "shifted"]
            for output in outputs.values():
                assert output.loss.ndim == 0
                assert output.logits.shape == (len(output.target), output.logits.shape[1])
                assert int(output.target.max()) < output.logits.shape[1]
                again = nn.functional.cross_entropy(output.logits, output.target)
                assert torch.equal(again, output.loss)
            plain, shifted = outputs["plain"].loss, outputs["shifted"].loss
            assert float(plain.detach()) != float(shifted.detach())
            terms = {"plain": plain, "shifted": shifted, "third": 2 * plain}
            self.log.append(float((3 * plain + shifted).detach()))
            return terms

    method = TwoPasses()
    trainer = make_trainer(method, epochs=1, dropout=0.0)
    trainer.run()
    assert trainer.outcome.epochs[0].loss == pytest.approx(sum(method.log) / STEPS)


def test_the_sum_of_the_losses_is_what_is_minimised(make_trainer: MakeTrainer) -> None:
    class Doubled(Toy):
        def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
            return {"task": outputs["task"].loss, "again": outputs["task"].loss}

        def after_backward(self, state: StepState) -> None:
            self.log.append([p.grad.clone() for p in state.model.parameters() if p.grad is not None])

    class Single(Doubled):
        losses = Method.losses

    doubled, single = Doubled(), Single()
    for method in (doubled, single):
        make_trainer(method, epochs=1, dropout=0.0).run()
    for twice, once in zip(doubled.log[0], single.log[0], strict=True):
        torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_after_backward_are_unscaled(make_trainer: MakeTrainer, precision: str) -> None:
    class Looking(Toy):
        def after_backward(self, state: StepState) -> None:
            gradient = next(state.model.sequence.parameters()).grad
            assert gradient is not None
            self.log.append(float(gradient.norm()))

    norms = {}
    for kind in ("fp32", precision):
        method = Looking()
        make_trainer(method, epochs=1, dropout=0.0, precision=kind).run()
        norms[kind] = method.log[0]
    assert norms[precision] == pytest.approx(norms["fp32"], rel=0.05)


def test_what_after_backward_does_to_the_gradients_counts(make_trainer: MakeTrainer) -> None:
    class Silencing(Toy):
        def after_backward(self, state: StepState) -> None:
            for parameter in state.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    trainer = make_trainer(Silencing(), epochs=1)
    before = weights(trainer.model)
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer.model), strict=True))


def test_after_step_sees_stepped_weights_and_kept_gradients(make_trainer: MakeTrainer) -> None:
    class Looking(Toy):
        def before_step(self, state: StepState) -> None:
            assert all(parameter.grad is None for parameter in state.model.parameters())
            self.before = weights(state.model)

        def after_step(self, state: StepState, context: Context) -> None:
            moved = [not torch.equal(a, b) for a, b in zip(self.before, weights(state.model), strict=True)]
            gradients = [p.grad is not None for p in state.model.parameters() if p.requires_grad]
            self.log.append((any(moved), all(gradients), state.skipped))

    method = Looking()
    make_trainer(method, epochs=1).run()
    assert method.log == [(True, True, False)] * STEPS


def test_after_step_is_not_called_on_a_skipped_step(make_trainer: MakeTrainer) -> None:
    class Overflowing(Toy):
        start: list[Tensor]

        def before_step(self, state: StepState) -> None:
            self.first = state.step == 0
            same = [torch.equal(a, b) for a, b in zip(self.start, weights(state.model), strict=True)]
            self.log.append(("unmoved", all(same)))

        def losses(self, outputs: Mapping[str, PassOutput]) -> dict[str, Tensor]:
            # Finite, but not once the scaler has multiplied it by 65536.
            return {"task": outputs["task"].loss * (1e34 if self.first else 1.0)}

        def after_step(self, state: StepState, context: Context) -> None:
            self.log.append(("after_step", state.step))

        def on_epoch_end(self, state: StepState) -> None:
            self.log.append(("end", state.step, state.skipped))

    method = Overflowing()
    trainer = make_trainer(method, epochs=1, precision="fp16", max_steps_per_epoch=3)
    method.start = weights(trainer.model)
    trainer.run()
    steps = [("unmoved", True), ("unmoved", True), ("after_step", 1), ("unmoved", False), ("after_step", 2)]
    assert method.log == [*steps, ("end", 3, False)]


def test_on_epoch_end_is_part_of_the_training_time(make_trainer: MakeTrainer) -> None:
    class Looking(Toy):
        trainer: Trainer

        def on_epoch_end(self, state: StepState) -> None:
            self.log.append((len(self.trainer.phases.phases), len(self.trainer.outcome.epochs)))
            with pytest.raises(RuntimeError, match=r"while 'epoch \d' is open"), self.trainer.phases.phase("search"):
                pass

    method = Looking()
    method.trainer = make_trainer(method)
    method.trainer.run()
    assert [epochs for _, epochs in method.log] == [0, 1]


def test_stages_have_optimisers_names_and_parameters_of_their_own(make_trainer: MakeTrainer) -> None:
    class Staged(Toy):
        def stages(self) -> tuple[Stage, ...]:
            return (Stage("all", 0.75), Stage("fusion", 0.25))

        def begin_stage(self, state: StepState) -> None:
            only_heads = state.stage.name == "fusion"
            state.model.sequence.requires_grad_(not only_heads)
            self.log.append((state.stage.name, state.epoch, state.step))

        def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
            assert fused
            made = torch.optim.SGD(groups, lr=0.1)
            self.log.append(sum(p.numel() for group in made.param_groups for p in group["params"]))
            return made

    method = Staged()
    trainer = make_trainer(method, epochs=4)
    heads = sum(parameter.numel() for parameter in trainer.model.item_encoder.parameters())
    everything = heads + sum(parameter.numel() for parameter in trainer.model.sequence.parameters())
    trainer.run()
    assert method.log == [("all", 0, 0), everything, ("fusion", 3, 3 * STEPS), heads]
    trains = [phase.name for phase in trainer.phases.phases if phase.kind == "train"]
    assert trains == ["all epoch 1", "all epoch 2", "all epoch 3", "fusion epoch 4"]
    assert [epoch.stage for epoch in trainer.outcome.epochs] == ["all", "all", "all", "fusion"]
    assert trainer.outcome.trainable_max == everything


@pytest.mark.parametrize(
    ("shares", "epochs", "expected"),
    [((1.0,), 5, [5]), ((0.5, 0.5), 5, [2, 3]), ((0.1, 0.9), 3, [1, 3]), ((1, 1, 1), 6, [2, 2, 2])],
)
def test_stages_share_the_epochs(
    make_trainer: MakeTrainer, shares: tuple[float, ...], epochs: int, expected: list[int]
) -> None:
    class Staged(Toy):
        def stages(self) -> tuple[Stage, ...]:
            return tuple(Stage(f"s{number}", share) for number, share in enumerate(shares))

    trainer = make_trainer(Staged(), epochs=epochs, max_steps_per_epoch=1)
    trainer.run()
    names = [phase.name.partition(" ")[0] for phase in trainer.phases.phases if phase.kind == "train"]
    assert [names.count(f"s{number}") for number in range(len(shares))] == expected


def test_parameter_groups_follow_their_learning_rates(make_trainer: MakeTrainer) -> None:
    class Looking(Toy):
        def adapt(self, model: Recommender, schedule: Any) -> None:
            model.encoders.requires_grad_(True)

        def param_groups(self, model: Recommender, lr: LearningRates) -> list[dict[str, Any]]:
            groups = super().param_groups(model, lr)
            self.log.append({group["name"]: group["lr"] for group in groups})
            return [*groups[:1], *({**group, "lr": 0.0} for group in groups[1:])]

        def optimizer(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
            made = super().optimizer(groups, fused=fused)
            assert isinstance(made, torch.optim.Adam)
            assert {group["weight_decay"] for group in made.param_groups} == {0}
            return made

    method = Looking()
    trainer = make_trainer(method, lr=1e-3, epochs=1)
    before = weights(trainer.model.encoders), weights(trainer.model.sequence)
    trainer.run()
    assert method.log == [{"recommender": 1e-3, "text": 2e-3}]
    after = weights(trainer.model.encoders), weights(trainer.model.sequence)
    still, moved = (all(map(torch.equal, *pair)) for pair in zip(before, after, strict=True))
    assert still
    assert not moved


def test_a_method_may_own_the_procedure(make_trainer: MakeTrainer) -> None:
    class Twice(Toy):
        def run(self, context: Context) -> None:
            context.train()
            self.log.append((context.state.epoch, context.state.step))
            context.train()

    method = Twice()
    trainer = make_trainer(method)
    trainer.run()
    assert method.log == [(2, 2 * STEPS)]
    assert [epoch.index for epoch in trainer.outcome.epochs] == [1, 2, 3, 4]

    class Nothing(Toy):
        def run(self, context: Context) -> None:
            pass

    trainer = make_trainer(Nothing())
    trainer.run()
    assert trainer.outcome.epochs == []
    assert trainer.outcome.test_ranks is not None  # it is still evaluated


def test_adapt_gets_the_plan_and_what_comes_after_training(world: Any, harness: Any, tmp_path: Any) -> None:
    body = f"""
    baseline = True

    def note(self, *what):
        with open({str(tmp_path / "log")!r}, "a") as file:
            print(*what, file=file)

    def adapt(self, model, schedule):
        self.extra = torch.nn.Parameter(torch.zeros(5))
        model.item_encoder.register_parameter("extra", self.extra)
        model.item_encoder.register_forward_hook(lambda module, args, out: out + self.extra.sum())
        if self.extra.device.type != "meta" and not model.item_encoder.heads["text"].weight.is_meta:
            steps = schedule.steps_per_epoch
            self.note("adapt", schedule.epochs, steps, schedule.total_steps, len(schedule.popularity))

    def state(self, model):
        self.note("state", bool(model.item_encoder.extra.any()))
        return {{"kept": torch.zeros(3, dtype=torch.float16)}}

    def report(self, model):
        self.note("report", hasattr(self, "prepared"))
        return {{"kept_rows": 3}}

    def prepare_inference(self, model):
        self.prepared = True
        self.note("prepare_inference", model.training)
    """
    harness.write_method(tmp_path / "methods", "late", body)
    matrix = world.matrix(["late"], modalities=["text"], training={"epochs": 3, "users_per_batch": 20})
    result = world.tell(matrix, tmp_path / "cell", methods_path=(tmp_path / "methods",))
    assert result.failure is None
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == f"adapt 3 2 6 {result.dataset.items + 1}"
    # Counted before training for cells that fail, and after it, before anything is merged.
    assert lines[1:5] == ["state False", "state True", "report False", "prepare_inference False"]
    assert result.parameters.stored_bytes == 6
    assert result.counters["kept_rows"].value == 3
    assert result.counters["kept_rows"].source == "report() of late"
    assert result.parameters.by_group["recommender"] > 5
