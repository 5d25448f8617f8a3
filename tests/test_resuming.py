"""Kill -9 in the middle of a search and of a federation: the next attempt goes on, and ends with the same result."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tpme.bench.record import CellResult

SHARED = """
    def note(self, what):
        import os, signal
        with open(os.environ["NOTES"], "a") as notes:
            print(what, file=notes)
        if what == os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)

"""
SEARCH = (
    SHARED
    + """
    def run(self, context):
        from tpme.methods.registry import create

        def trial(width):
            self.note(f"trial {width}")
            fork = context.fork(create("adapter", {"bottleneck": width}), context.seed)
            fork.train(1, users=context.users[:20], kind="search")
            self.note(f"end of trial {width}")
            return {"recall": fork.validate().recall_10}

        found = {}
        for width in (2, 3, 4):
            found[width] = context.once("search", f"trial {width}", lambda: trial(width))["recall"]
        best = max(found, key=found.get)
        context.adopt(context.fork(create("adapter", {"bottleneck": best}), context.seed))
        context.train()
        self.found = found

    def report(self, model):
        return {f"recall_of_{width}": recall for width, recall in getattr(self, "found", {}).items()}
"""
)
FEDERATION = (
    SHARED
    + """
    def run(self, context):
        parts = [context.users[0::2], context.users[1::2]]
        model = context.state.model

        def one_round(number):
            self.note(f"round {number}")
            states = []
            for users in parts:
                client = context.fork(type(self)(self.config), context.seed)
                client.state.model.load_state_dict(model.state_dict())
                client.train(1, users=users, kind="round")
                states.append(self.state(client.state.model))
            self.note(f"end of round {number}")
            return {name: sum(state[name] for state in states) / len(states) for name in states[0]}

        self.recalls = []
        for number in (1, 2, 3):
            self.load_state(model, context.once("round", f"round {number}", lambda: one_round(number)))
            self.recalls.append(context.validate().recall_10)

    def report(self, model):
        return {f"recall_{number}": recall for number, recall in enumerate(getattr(self, "recalls", []))}
"""
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "kill", "before", "after"),
    [
        pytest.param(SEARCH, "end of trial 3", ["trial 2", "trial 3"], ["trial 3", "trial 4"], id="search"),
        pytest.param(FEDERATION, "end of round 2", ["round 1", "round 2"], ["round 2", "round 3"], id="federation"),
    ],
)
def test_an_attempt_goes_on_after_kill_9(
    world: Any,
    harness: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    kill: str,
    before: list[str],
    after: list[str],
) -> None:
    """Real cells in processes of their own, by the launcher; and another cell that nobody killed."""
    harness.write_method(tmp_path / "methods", "proceeding", body)
    matrix = world.matrix(["proceeding"], modalities=["text"], training={"epochs": 2})
    notes = tmp_path / "notes"
    monkeypatch.setenv("NOTES", str(notes))

    def attempt(folder: str) -> tuple[CellResult, list[str]]:
        notes.write_text("")
        [result] = world.run(matrix, tmp_path / folder, methods_path=[tmp_path / "methods"])
        return result, [line for line in notes.read_text().splitlines() if not line.startswith("end")]

    monkeypatch.setenv("KILL", kill)
    killed, done = attempt("run")
    assert (killed.status, done) == ("killed", before)
    [cell] = (tmp_path / "run" / "cells").iterdir()
    assert len(list((cell / "procedure").glob("*.safetensors"))) == 1
    monkeypatch.delenv("KILL")
    resumed, done = attempt("run")
    assert (resumed.failure, resumed.attempt, done) == (None, 2, after)
    assert not (cell / "procedure").exists()
    whole, done = attempt("other")
    assert done == [*before[:1], *after]

    def ranks(folder: str, result: CellResult) -> Any:
        [path] = (tmp_path / folder).glob(f"cells/*/{result.files['ranks']}")
        return np.load(path)["rank"]

    assert np.array_equal(ranks("run", resumed), ranks("other", whole))
    assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in whole.epochs]
    own = [name for name in whole.counters if name.startswith("recall_")]
    assert len(own) == 3
    assert [resumed.counters[name] for name in own] == [whole.counters[name] for name in own]
    kind = "search" if body is SEARCH else "round"
    assert [phase.name for phase in resumed.phases if phase.kind == kind] == after
    spent = sum(phase.wall_s for phase in resumed.phases if phase.kind in (kind, "train"))
    assert resumed.all_in_s is not None
    assert resumed.all_in_s.value is not None
    assert resumed.all_in_s.value > spent
    assert "s of it in earlier attempts" in resumed.all_in_s.source
