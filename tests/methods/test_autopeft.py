"""AutoPEFT: the modules of a configuration, the search and its store, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tpme.bench.contract.subject import Subject
from tpme.bench.errors import UserError
from tpme.bench.run.matrix import MatrixFile
from tpme.bench.run.plan import plan_matrix
from tpme.bench.train.loop import Trainer
from tpme.methods.autopeft import BUDGETS, AutoPEFT, Budget, Trial, chosen_trial, front_of
from tpme.methods.parts import search_engine
from tpme.methods.parts.search_space import Vector

SEARCH = {"budget": "smoke", "engine": "random", "trial_users": 0.5, "trial_epochs": 1}
ON = {"text": {"serial": 3, "parallel": 2, "prefix": 2, "layers": [1]}, "image": {"parallel": 2, "layers": [0]}}
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(contract_world: Any, monkeypatch: pytest.MonkeyPatch) -> MakeTrainer:
    """Build the trainer of a cell in the world of the contract suite; each has a folder of its own. Four trials."""

    monkeypatch.setitem(BUDGETS, "smoke", Budget(random=2, trials=4))

    def make(seed: int = 1, kept: Path | None = None, **options: Any) -> Trainer:
        subject = Subject(contract_world, "autopeft", SEARCH | options)
        trainer = subject.trainer(subject.cell(seed=seed))
        if kept is not None:
            trainer.kept.folder = kept
        return trainer

    return make


# --- the modules of a configuration ---------------------------------------------------------------------------------


def test_a_layer_with_all_modules_is_that_of_the_formula(tiny: ModuleType) -> None:
    """``f + SA(LN(x + f)) + 4 PA(x)`` after the attention, in BERT; without LN in ViT. Layers without a bit stay."""
    torch.manual_seed(0)
    both = {"serial": 3, "parallel": 2, "layers": [1]}
    _, model = tiny.build("autopeft", {"configuration": {"text": both, "image": both}})
    for modality, view in model.views.items():
        plain = tiny.views()[modality]
        parts = view.module.get_submodule("found_modules")
        serial, parallel = parts["serial_1"], parts["parallel_1"]
        for linear in (serial.down, serial.up, parallel.down, parallel.up):
            nn.init.normal_(linear.weight)
            nn.init.normal_(linear.bias)
        x = torch.randn(2, 5, tiny.WIDTH)
        assert torch.equal(view.layers[0](x), plain.layers[0](x))
        layer = plain.layers[1]
        if modality == "text":
            h = layer.attention(x)[0]
            f = layer.output.dense(layer.intermediate(h))
            norm = layer.output.LayerNorm
            sa, pa = serial.up(torch.relu(serial.down(norm(h + f)))), parallel.up(torch.relu(parallel.down(h)))
            expected = norm(h + f + sa + 4 * pa)
        else:
            h = x + layer.attention(layer.layernorm_before(x))[0]
            f = layer.mlp(layer.layernorm_after(h))
            sa, pa = serial.up(torch.relu(serial.down(h + f))), parallel.up(torch.relu(parallel.down(h)))
            expected = h + f + sa + 4 * pa
        torch.testing.assert_close(view.layers[1](x), expected, atol=1e-4, rtol=1e-4)


def test_a_layer_that_is_off_has_no_parameter_and_no_hook(tiny: ModuleType) -> None:
    torch.manual_seed(0)
    _, model = tiny.build("autopeft", {"configuration": ON})
    text, image = model.views["text"], model.views["image"]
    names = [name for name, p in text.module.named_parameters() if p.requires_grad]
    assert {name.split(".")[1] for name in names} == {"prefix", "serial_1", "parallel_1"}
    assert text.module.get_parameter("found_modules.prefix.layers.0").shape[2] == 2
    assert [len(text.sublayer_outputs(layer)[1]._forward_hooks) for layer in (0, 1)] == [0, 2]
    assert [len(image.sublayer_outputs(layer)[1]._forward_hooks) for layer in (0, 1)] == [1, 0]
    x, plain = torch.randn(2, 5, tiny.WIDTH), tiny.views()["text"]
    same = [torch.equal(text.layers[layer](x), plain.layers[layer](x)) for layer in (0, 1)]
    assert same == [True, False], "the attention of a layer that is off has no prefix either"


def test_parallel_adapters_alone_start_at_the_frozen_encoders(tiny: ModuleType) -> None:
    parallel = {"parallel": 4}
    _, model = tiny.build("autopeft", {"configuration": {"text": parallel, "image": parallel}})
    _, frozen = tiny.build("frozen")
    items = tiny.items()
    assert torch.equal(tiny.vectors(model, items), tiny.vectors(frozen, items))


@pytest.mark.parametrize("off", [{}, {"layers": [0, 1]}, {"serial": 2, "prefix": 2, "layers": []}])
def test_an_encoder_without_a_module_stays_as_it_is_to_the_last_bit(
    contract_world: Any, make_trainer: MakeTrainer, off: dict[str, Any]
) -> None:
    trainer = make_trainer(configuration={"text": {"serial": 2}, "image": off})
    assert trainer.model.frozen == {"image"}
    before = Subject(contract_world, "autopeft").fresh_views["image"].module.state_dict()
    trainer.run()
    after = trainer.model.views["image"].module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert trainer.method.report(trainer.model)["image_layers"] == 0


def test_the_adapters_are_those_of_the_methods_of_that_name(tiny: ModuleType) -> None:
    for name, kind in (("pfeiffer-adapter", "serial"), ("parallel-adapter", "parallel"), ("prefix", "prefix")):
        _, one = tiny.build(name, {"length": 4} if kind == "prefix" else {"bottleneck": 4})
        _, other = tiny.build("autopeft", {"configuration": {"text": {kind: 4}, "image": {kind: 4}}})
        trained, found = ([p for p in m.parameters() if p.requires_grad] for m in (one, other))
        assert [p.shape for p in trained] == [p.shape for p in found]
        with torch.no_grad():
            for mine, theirs in zip(found, trained, strict=True):
                mine.copy_(theirs.normal_(std=0.1))
        assert torch.equal(tiny.vectors(other, tiny.items()), tiny.vectors(one, tiny.items()))


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_winner_is_trained_anew_and_the_cost_of_the_search_is_beside_it(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    driver: Any = trainer.method
    trainer.run()
    winner = driver.trials[driver.winner]
    assert len(driver.trials) == 4
    assert trainer.method is not driver
    assert driver.space.encode(trainer.method.config.configuration) == winner.vector
    assert winner.ndcg_10 == max(trial.ndcg_10 for trial in driver.trials)
    trains = sum(p.numel() for m in trainer.model.encoders.values() for p in m.parameters() if p.requires_grad)
    assert trains == winner.parameters
    found = driver.report(trainer.model)
    assert (found["procedure_trials"], found["procedure_trials_failed"]) == (4, 0)
    assert found["procedure_search_s"] >= sum(trial.seconds for trial in driver.trials)
    assert found[f"trial_{driver.winner + 1:03}_text_serial"] == trainer.method.report(trainer.model)["text_serial"]
    assert [found[f"trial_{n:03}_ndcg_10"] for n in range(1, 5)] == [trial.ndcg_10 for trial in driver.trials]
    by_hand = make_trainer(configuration=trainer.method.config.model_dump(mode="json")["configuration"])
    by_hand.run()
    assert np.array_equal(by_hand.outcome.test_ranks, trainer.outcome.test_ranks)
    assert [epoch.loss for epoch in by_hand.outcome.epochs] == [epoch.loss for epoch in trainer.outcome.epochs]


def test_a_trial_trains_a_share_of_the_users(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[Any, ...]] = []
    train = Trainer.train

    def noted(self: Trainer, epochs: int | None = None, users: Any = None, kind: str = "train") -> None:
        trained.append((epochs, None if users is None else tuple(users), kind))
        train(self, epochs, users, kind)

    monkeypatch.setattr(Trainer, "train", noted)
    trainer = make_trainer(trial_users=0.25, trial_epochs=5)
    trainer.run()
    *trials, final = trained
    assert len({users for _, users, _ in trials}) == 1, "the same users in every trial"
    assert {(epochs, len(users), kind) for epochs, users, kind in trials} == {
        (2, -(-len(trainer.users) // 4), "search")
    }
    assert final == (None, None, "train")


def test_interrupted_it_goes_on_at_the_first_trial_that_is_not_finished(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = make_trainer()
    driver: Any = whole.method
    whole.run()
    trial, done = AutoPEFT._trial, []

    def interrupted(self: AutoPEFT, context: Any, vector: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(vector)
        return trial(self, context, vector)

    monkeypatch.setattr(AutoPEFT, "_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(kept=tmp_path).run()
    assert len(list(tmp_path.glob("trial-*.safetensors"))) == 3
    done.clear()
    second = make_trainer(kept=tmp_path)
    again: Any = second.method
    second.run()
    assert len(done) == 1
    results = [[(trial.vector, trial.parameters, trial.ndcg_10) for trial in each.trials] for each in (driver, again)]
    assert results[0] == results[1]
    assert again.winner == driver.winner
    assert np.array_equal(second.outcome.test_ranks, whole.outcome.test_ranks)
    kept = sum(trial.seconds for trial in again.trials[:3])
    assert second.kept.resumed_s >= kept > 0


def test_the_seed_chooses_the_trials(make_trainer: MakeTrainer) -> None:
    found = [searched(make_trainer(seed=seed)) for seed in (1, 2)]
    assert not set(found[0]) & set(found[1])


def searched(trainer: Trainer) -> list[Vector]:
    """The vectors that a search of the trainer's cell has tried."""
    driver: Any = trainer.method
    trainer.run()
    return [trial.vector for trial in driver.trials]


@pytest.mark.skipif(find_spec("botorch") is None, reason="botorch is not installed (extra search)")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_bayesian_search_starts_as_a_random_one(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(_self: AutoPEFT, _context: Any, vector: Vector) -> dict[str, Any]:
        return {"vector": list(vector), "parameters": 1 + sum(vector), "seconds": 1.0, "ndcg_10": 1 / sum(vector)}

    monkeypatch.setattr(AutoPEFT, "_trial", trial)
    found = [searched(make_trainer(engine=engine)) for engine in ("gp", "random")]
    assert found[0][:2] == found[1][:2]
    assert found[0][2:] != found[1][2:]


def test_the_budgets_are_half_random_and_the_last_is_that_of_the_paper() -> None:
    assert all(2 * budget.random == budget.trials for budget in BUDGETS.values())
    assert BUDGETS["paper"] == (100, 200, 4)


# --- the choice -----------------------------------------------------------------------------------------------------

TRIALS = [
    Trial((0,), 400, 1.0, 0.30),
    Trial((1,), 100, 1.0, 0.28),
    Trial((2,), 200, 1.0, 0.27),  # dominated by the one before
    Trial((3,), 50, 1.0, 0.10),
    Trial((4,), 10, 1.0, None, "DivergedError: the loss is not finite"),
]


def test_the_front_and_the_choice() -> None:
    assert front_of(TRIALS) == [0, 1, 3]
    assert [chosen_trial(TRIALS, tolerance) for tolerance in (0.0, 0.05, 0.1, 0.9)] == [0, 0, 1, 3]


def test_a_trial_that_diverges_is_a_result(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, forks = Trainer.fork, []

    def broken(self: Trainer, method: Any, seed: int) -> Trainer:
        made = fork(self, method, seed)
        forks.append(made)
        if len(forks) == 2:
            with torch.no_grad():
                next(p for p in made.model.parameters() if p.requires_grad).fill_(torch.nan)
        return made

    monkeypatch.setattr(Trainer, "fork", broken)
    trainer = make_trainer()
    driver: Any = trainer.method
    trainer.run()
    assert driver.trials[1].ndcg_10 is None
    assert str(driver.trials[1].failed).startswith("DivergedError: the loss is not finite")
    assert driver.report(trainer.model)["procedure_trials_failed"] == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
    ],
)
def test_memory_that_runs_out_fails_a_trial_and_a_bug_ends_the_search(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: bool
) -> None:
    def failing(*_: Any, **_settings: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "fork", failing)
    message = rf"none of 4 trials finished \(the last: {type(error).__name__}" if expected else "mat1"
    with pytest.raises(UserError if expected else RuntimeError, match=message) as raised:
        make_trainer().run()
    assert "\n" not in str(raised.value)


# --- what is refused before anything runs --------------------------------------------------------------------------

REFUSED = {
    "all layers off": (
        {"configuration": {"text": {"serial": 8, "layers": []}, "image": {"prefix": 8, "layers": []}}},
        "the configuration gives no encoder a module; name layers and a size above 0",
    ),
    "all sizes off": ({"configuration": {"text": {"layers": [0]}}}, "the configuration gives no encoder a module"),
    "no such layer": (
        {"configuration": {"image": {"serial": 8, "layers": [0, 99]}}},
        r"configuration.image.layers names layer 99, but ViTModel has layers 0 to \d+",
    ),
    "a share of 0": ({"trial_users": 0.0}, "option 'trial_users': Input should be greater than 0"),
    "a share above 1": ({"trial_users": 1.5}, "option 'trial_users': Input should be less than or equal to 1"),
    "no kind": ({"kinds": []}, "option 'kinds': Tuple should have at least 1 item"),
    "a negative size": ({"configuration": {"text": {"serial": -1}}}, "option 'configuration.text.serial'"),
    "options of a search beside a configuration": (
        {"configuration": {"text": {"serial": 8}}, "budget": "small"},
        "option 'budget' belongs to a search, but a configuration is trained without one; remove either",
    ),
    "without its extra": ({"engine": "gp"}, r"with engine = 'gp' needs botorch: pip install .*\[search\]'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_run_and_plan_refuse_what_does_not_fit(
    world: Any, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, message = REFUSED[name]
    monkeypatch.setattr(search_engine, "find_spec", lambda _name: None)

    def entered() -> MatrixFile:
        searching = {} if "configuration" in options else {"engine": "random"}
        return world.matrix([{"name": "autopeft", "options": searching | options}])

    def planned() -> None:
        plan_matrix(entered(), store=world.store, console=harness.quiet())

    for command in (lambda: world.run(entered(), tmp_path / "run"), planned):
        with pytest.raises(UserError, match=message) as error:
            command()
        assert "\n" not in str(error.value)


# --- kill -9 ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal

from tpme.methods.autopeft import AutoPEFT


def reached(place):
    with open(os.environ["NOTES"], "a") as notes:
        print(place, file=notes)
    if os.environ.get("KILL") == place:
        os.kill(os.getpid(), signal.SIGKILL)


class Killed(AutoPEFT):
    def _trial(self, context, vector):
        reached(f"trial {len(self.trials) + 1}")
        return super()._trial(context, vector)

    def _proposal(self, engine, count):
        reached("proposal")
        return super()._proposal(engine, count)

    def on_epoch_end(self, state):
        if state.schedule.epochs == 2:
            reached(f"epoch {state.epoch}")


METHOD = Killed
"""


@pytest.mark.slow
def test_kill_9_changes_neither_trials_nor_choice_nor_ranks(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a trial, of proposing and of the final training, one after the other, of the same search."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "killed.py").write_text(KILLED)
    engine = "random" if find_spec("botorch") is None else "gp"
    matrix = world.matrix([{"name": "killed", "options": SEARCH | {"engine": engine}}], training={"epochs": 2})
    notes = tmp_path / "notes"
    monkeypatch.setenv("NOTES", str(notes))

    def attempt(folder: str, kill: str = "") -> tuple[Any, list[str]]:
        notes.write_text("")
        monkeypatch.setenv("KILL", kill)
        [result] = world.run(matrix, tmp_path / folder, methods_path=[tmp_path / "methods"])
        return result, notes.read_text().splitlines()

    first, second = [f"trial {n}" for n in range(1, 5)], [f"trial {n}" for n in range(5, 9)]
    whole, done = attempt("whole")
    assert done == [*first, "proposal", *second, "epoch 1", "epoch 2"]
    done_before_kills = {"trial 3": first[:3], "proposal": [*first[2:], "proposal"]}
    done_before_kills |= {"trial 7": ["proposal", *second[:3]], "epoch 1": [*second[2:], "epoch 1"]}
    for kill, expected in done_before_kills.items():
        killed, done = attempt("run", kill)
        assert (killed.status, done) == ("killed", expected)
    resumed, done = attempt("run")
    assert (resumed.failure, done) == (None, ["epoch 1", "epoch 2"])

    def found(result: Any) -> dict[str, float | None]:
        return {name: r.value for name, r in result.counters.items() if name.startswith(("trial_", "procedure_winner"))}

    def ranks(folder: str, result: Any) -> Any:
        [path] = (tmp_path / folder).glob(f"cells/*/{result.files['ranks']}")
        return np.load(path)["rank"]

    assert len(found(whole)) > 16
    assert found(resumed) == found(whole)
    assert np.array_equal(ranks("run", resumed), ranks("whole", whole))
    assert not [phase for phase in resumed.phases if phase.kind == "search"]
    searched_s = resumed.counters["procedure_search_s"].value
    assert resumed.all_in_s.value >= searched_s > 0, "times of all attempts are added up"
    assert "s of it in earlier attempts" in resumed.all_in_s.source
