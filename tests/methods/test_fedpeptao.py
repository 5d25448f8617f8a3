"""FedPepTAO in the real trainer: its special cases bit for bit, its layers, bytes, times and errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from tpme.bench.cli import app
from tpme.bench.contract.subject import Subject, vectors
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult
from tpme.bench.train.loop import Trainer
from tpme.methods.fedpeptao import FedPepTAO, FedPepTAOConfig
from tpme.methods.parts.federation import put, trained
from tpme.methods.parts.federation_layers import layer_score
from tpme.methods.parts.partial_prefix import partial_prefixes, without_prompts
from tpme.methods.registry import create
from tpme.reports.data.columns import row_of

PLAIN = {"length": 3, "dropout": 0.0, "weight_decay": 0.0, "clip_norm": None}
"""What else a client's training has beside prompt tuning's."""
FOUR = PLAIN | {"clients": 4, "sample": 0.5, "rounds": 3, "local_epochs": 1, "partition": "iid"}


def run(world: Any, name: str, options: dict[str, Any], **training: Any) -> Trainer:
    """The trainer of a method after its whole procedure, without dropout."""
    trained_one = Subject(world, name, options).train(dropout=0.0, **training)
    assert trained_one.error is None
    return trained_one.trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name.replace(".chosen", ""): value.clone() for name, value in trained(trainer.model).items()}


def test_one_client_is_centralised_prompt_tuning_to_the_last_bit(contract_world: Any) -> None:
    """Two rounds of two epochs of one client, whose optimiser goes on, and four epochs of method ``prefix``."""
    options = {"layer_ratio": 1.0, "clients": 1, "rounds": 2, "local_epochs": 2, "algorithm": "fedavg"}
    alone = run(contract_world, "fedpeptao", PLAIN | options | {"client_optimizer": "persist"})
    central = run(contract_world, "prefix", {"length": 3}, epochs=4)
    expected = weights(central)
    assert weights(alone).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights(alone).items())
    reset = run(contract_world, "fedpeptao", PLAIN | options)
    assert not all(torch.equal(value, expected[name]) for name, value in weights(reset).items())


def test_fedavg_is_the_special_case_without_a_server_step_to_the_last_bit(contract_world: Any) -> None:
    """And both are the average written out."""
    still = weights(run(contract_world, "fedpeptao", FOUR | {"server_rate": 0.0}))
    plain = run(contract_world, "fedpeptao", FOUR | {"algorithm": "fedavg"})
    assert all(torch.equal(value, still[name]) for name, value in weights(plain).items())
    moved = weights(run(contract_world, "fedpeptao", FOUR))
    prompts = [name for name in moved if ".prefix." in name]
    assert prompts
    assert not any(torch.equal(moved[name], still[name]) for name in prompts)

    trainer = Subject(contract_world, "fedpeptao", FOUR | {"algorithm": "fedavg"}).trainer(dropout=0.0)
    method = trainer.method
    assert isinstance(method, FedPepTAO)
    method.before_training(trainer)
    federation = method._federation
    assert federation is not None
    for number in (1, 2, 3):
        start = weights(trainer)
        sampled = federation.sample(trainer.seed, number)
        users = [len(federation.clients[client]) for client in sampled]
        mean = {name: np.zeros(value.shape) for name, value in start.items()}
        for client in sampled:
            put(trainer.model, start)
            trainer.train(1, federation.clients[client], "round")
            for name, value in weights(trainer).items():
                mean[name] += len(federation.clients[client]) / sum(users) * value.double().numpy()
        put(trainer.model, {name: torch.from_numpy(value).float() for name, value in mean.items()})
    assert all(torch.equal(value, still[name]) for name, value in weights(trainer).items())


def test_a_round_changes_neither_encoders_nor_what_is_not_sampled(contract_world: Any) -> None:
    trainer = Subject(contract_world, "fedpeptao", FOUR).trainer()
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.run()
    own = dict(trainer.model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in frozen.items())


# --- layers -----------------------------------------------------------------------------------------------------------


def test_prompts_are_in_the_layers_with_the_highest_scores(contract_world: Any) -> None:
    """Scores written out: every client's first items through the fresh encoders, weighted by its users."""
    subject = Subject(contract_world, "fedpeptao", {"clients": 3, "rounds": 1})
    trainer = subject.trainer()
    method = trainer.method
    assert isinstance(method, FedPepTAO)
    method.before_training(trainer)
    assert method._federation is not None
    clients = method._federation.clients
    firsts = []
    for users in clients:
        ids = next(iter(trainer.batches(users))).items.ids
        firsts.append(sorted(set(ids.tolist()) - {0}))
    fewest = min(32, *map(len, firsts))
    for modality, view in subject.fresh_views.items():
        scores = np.zeros(view.shape.depth)
        for users, ids in zip(clients, firsts, strict=True):
            items = subject.items(trainer, ids[:fewest])
            mask = items.token_mask if modality == "text" else None
            outputs: list[torch.Tensor] = []
            hooks = [layer.register_forward_hook(partial(_keep, outputs)) for layer in view.layers]
            with torch.no_grad():
                view.encode(
                    trainer.model.item_encoder.reads[modality],
                    tokens=items.tokens,
                    token_mask=items.token_mask,
                    image=items.image,
                )
            for hook in hooks:
                hook.remove()
            for level, states in enumerate(outputs[:-1]):
                kept = states if mask is None else states * mask[:, :, None]
                scores[level] += len(users) / 30 * layer_score(kept)
        found = method._estimated["scores"][modality]
        assert found == pytest.approx(scores.tolist(), rel=1e-3)
        best = np.argsort(-scores, kind="stable")[: round(0.5 * view.shape.depth)]
        assert partial_prefixes(trainer.model)[modality].chosen == tuple(sorted(best.tolist()))


def _keep(outputs: list[torch.Tensor], _module: Any, _args: Any, output: Any) -> None:
    outputs.append(output[0] if isinstance(output, tuple) else output)


def test_without_prompts_an_encoder_is_the_frozen_one(contract_world: Any) -> None:
    subject = Subject(contract_world, "fedpeptao", {"length": 3})
    trainer = subject.trainer()
    items, model = subject.items(trainer), trainer.model
    with torch.no_grad(), without_prompts(model):
        bare = {modality: model.eval().states(modality, items) for modality in model.views}
    for modality, view in subject.fresh_views.items():
        reads = model.item_encoder.reads[modality]
        fresh = view.encode(reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image)
        torch.testing.assert_close(bare[modality], fresh)
        with torch.no_grad():
            assert not torch.allclose(model.states(modality, items), fresh, atol=1e-4)


def test_the_spectrum_may_choose_the_number_of_layers_and_a_fresh_model_loads_it(contract_world: Any) -> None:
    options = {"length": 2, "ratio_from": "spectrum", "clients": 2, "rounds": 1}
    subject = Subject(contract_world, "fedpeptao", options)
    trainer = subject.trained.trainer
    method, model = trainer.method, trainer.model
    assert isinstance(method, FedPepTAO)
    for modality, prefix in partial_prefixes(model).items():
        depth, ratio = model.views[modality].shape.depth, method._estimated["ratios"][modality]
        assert 0 <= ratio <= 1
        assert len(prefix.layers) == len(prefix.chosen) == max(1, round(ratio * depth))
    fresh = subject.trainer(subject.cell(seed=5))
    state = {name: value.clone() for name, value in method.state(model).items()}
    fresh.method.load_state(fresh.model, state)
    items = subject.items(trainer)
    assert torch.equal(vectors(fresh.method, fresh.model, items), vectors(method, model, items))
    with pytest.raises(ValueError, match="state of another structure: prompts in layers"):
        fresh.method.load_state(fresh.model, state | {"encoders.text.prefix.chosen": torch.tensor([7])})


# --- clients, bytes, times --------------------------------------------------------------------------------------------


def test_clients_prefer_clusters_of_items_and_have_every_user_once(contract_world: Any) -> None:
    trainer = Subject(contract_world, "fedpeptao", {"clients": 3, "alpha": 0.1, "rounds": 1}).trainer()
    method = trainer.method
    assert isinstance(method, FedPepTAO)
    method.before_training(trainer)
    assert method._federation is not None
    users = np.concatenate(method._federation.clients)
    assert sorted(users.tolist()) == trainer.users.tolist()
    again = Subject(contract_world, "fedpeptao", {"clients": 3, "alpha": 0.1, "rounds": 1}).trainer()
    again.method.before_training(again)
    for one, other in zip(method._federation.clients, again.method._federation.clients, strict=True):  # type: ignore[attr-defined]
        assert np.array_equal(one, other)


def test_bytes_and_times_are_those_of_the_rounds(contract_world: Any) -> None:
    """Per client, round and direction: four bytes for each number of prompts, heads, fusion, sequential encoder."""
    trainer = run(contract_world, "fedpeptao", FOUR)
    report = trainer.method.report(trainer.model)
    prompts = sum(len(p.chosen) * 3 * 2 * p.layers[0].shape[1] * p.layers[0].shape[3] for p in _prefixes(trainer))
    others = sum(
        value.numel() for part in (trainer.model.item_encoder, trainer.model.sequence) for value in part.parameters()
    )
    assert report["prompt_message_bytes"] == 4 * prompts
    assert report["head_message_bytes"] == 4 * others
    assert report["bytes_up"] == report["bytes_down"] == 3 * 2 * 4 * (prompts + others)
    depths = sum(view.shape.depth for view in trainer.model.views.values())
    assert report["estimate_bytes"] == 4 * depths * 4
    assert report["rounds"] == 3
    assert 0 < report["parallel_s"] < report["serial_s"]
    assert 0 < report["pass_parallel_s"] < report["pass_s"]
    method = trainer.method
    assert isinstance(method, FedPepTAO)
    assert report["passes"] == sum(one.users for one in method.rounds) / 30
    assert report["after_best_s"] == sum(one.serial_s for one in method.rounds[int(report["best_round"]) :])
    assert report["valid_recall_10"] == max(one.found.recall_10 for one in method.rounds if one.found)


def _prefixes(trainer: Trainer) -> list[Any]:
    return list(partial_prefixes(trainer.model).values())


def test_without_options_rounds_process_the_users_as_often_as_the_task_has_epochs(contract_world: Any) -> None:
    """Thirty users: three clients, one a round, two local epochs."""
    trainer = Subject(contract_world, "fedpeptao", {"length": 2}).trained.trainer
    method = trainer.method
    assert isinstance(method, FedPepTAO)
    assert len(method.rounds) == 3
    assert [one.found is not None for one in method.rounds] == [False, True, True]
    phases = [(phase.kind, phase.name) for phase in trainer.phases.phases if phase.kind in ("estimate", "round")]
    assert phases == [("estimate", ""), *(("round", f"round {number}") for number in (1, 2, 3))]


def test_a_record_of_rounds_has_t_m_and_a_flag_that_says_which(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    matrix = world.matrix([{"name": "fedpeptao", "options": {"length": 2, "rounds": 2}}])
    result = world.tell(matrix, tmp_path)
    assert (result.failure, result.epochs) == (None, ())
    assert result.epoch_time_s.value is None
    assert result.in_rounds
    assert result.pass_time_s.value == result.counters["pass_s"].value > 0
    peaks = [phase.memory.host_rss_bytes.value for phase in result.phases if phase.kind == "round"]
    assert result.pass_memory.host_rss_bytes.value == max(peaks)
    row = row_of(result, "cpu", None)
    assert row["epoch_time_s"] == result.counters["pass_s"].value
    assert row["memory_bytes"] == max(peaks)
    assert row["valid_recall_10"] == result.counters["valid_recall_10"].value
    assert "in-rounds" in {code for code, _ in row["flags"]}
    assert row["all_in_s"] > result.counters["serial_s"].value
    assert row["time_to_best_s"] == row["all_in_s"] - result.counters["after_best_s"].value > 0


KILLED = """
import os, signal
from tpme.methods.fedpeptao import FedPepTAO

class Killed(FedPepTAO):
    def before_step(self, state):
        if os.environ.get("KILL") == str(state.step):
            os.kill(os.getpid(), signal.SIGKILL)

METHOD = Killed
"""


@pytest.mark.slow
def test_after_kill_9_a_federation_goes_on_at_its_last_finished_round(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its third round of four; then ranks and counters of a federation that nobody killed.

    Without processes the contract suite checks the same (``resuming_changes_nothing``).
    """
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "killed.py").write_text(KILLED)
    options = {"length": 2, "clients": 4, "sample": 0.5, "local_epochs": 1, "rounds": 4, "client_optimizer": "persist"}
    matrix = world.matrix([{"name": "killed", "options": options}], training={"users_per_batch": 8})

    def attempt(folder: str) -> CellResult:
        [result] = world.run(matrix, tmp_path / folder, methods_path=[tmp_path / "methods"])
        return result

    monkeypatch.setenv("KILL", "9")  # rounds of two clients with one or two steps each
    killed = attempt("run")
    [cell] = (tmp_path / "run" / "cells").iterdir()
    done = sorted(path.name.rsplit("-", 1)[0] for path in (cell / "procedure").iterdir())
    assert killed.status == "killed"
    assert done[:2] == ["clients", "layers"]
    assert done[2:] in (["round-1", "round-2"], ["round-1", "round-2", "round-3"])
    monkeypatch.delenv("KILL")
    resumed, whole = attempt("run"), attempt("other")
    assert (resumed.status, resumed.attempt, whole.status) == ("ok", 2, "ok")
    assert [phase.name for phase in resumed.phases if phase.kind == "round"] == [
        f"round {number}" for number in range(len(done) - 1, 5)
    ]
    ranks = [
        np.load(next((tmp_path / folder).glob(f"cells/*/{result.files['ranks']}")))["rank"]
        for folder, result in (("run", resumed), ("other", whole))
    ]
    assert np.array_equal(*ranks)
    timed = {"serial_s", "parallel_s", "after_best_s", "pass_s", "pass_parallel_s"}
    own = [name for name, reading in whole.counters.items() if reading.source.startswith("report()")]
    assert len(own) > 10
    for name in own:
        assert (resumed.counters[name].value == whole.counters[name].value) or name in timed
    spent = sum(phase.wall_s for phase in resumed.phases if phase.kind in ("estimate", "round"))
    assert resumed.all_in_s is not None
    assert resumed.all_in_s.value is not None
    assert resumed.all_in_s.value > spent
    assert "s of it in earlier attempts" in resumed.all_in_s.source


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_ratio": 0.0}, "layer_ratio"),
        ({"layer_ratio": 1.5}, "layer_ratio"),
        ({"sample": 0.0}, "sample"),
        ({"clients": 0}, "clients"),
        ({"algorithm": "fedprox"}, "algorithm"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FedPepTAOConfig(**options)
    with pytest.raises(UserError, match=f"method 'fedpeptao'.*{message}") as error:
        create("fedpeptao", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("clients", [31, 61])
def test_more_clients_than_pairs_of_users_are_refused_before_anything_runs(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, clients: int
) -> None:
    monkeypatch.chdir(tmp_path)
    matrix = world.write(tmp_path / "m.toml", world.matrix([{"name": "fedpeptao", "options": {"clients": clients}}]))
    ended = CliRunner().invoke(app, [command, str(matrix), "--store", str(world.store)])
    assert isinstance(ended.exception, UserError)
    assert str(ended.exception) == (
        f"method 'fedpeptao': clients = {clients}, but there are only 60 training users, and a client needs 2 (one "
        "alone has no negatives); choose at most 30 clients"
    )
    assert not (tmp_path / "runs").exists()
