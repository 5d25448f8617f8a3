"""What ``tpme status`` says of a run folder that no cluster knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plain_record import result

from tpme.bench.errors import UserError
from tpme.bench.record import Failure, write_result
from tpme.bench.run import launch
from tpme.bench.run.cell_states import CellState, cell_states, counts

NAMES = ("ok", "oom", "error", "again", "running", "new")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with cells that ended in every way, one that runs and one that does not."""
    for name in NAMES:
        (tmp_path / "cells" / name).mkdir(parents=True)
    for name, status in (("ok", "ok"), ("oom", "oom"), ("error", "error"), ("again", "error")):
        failure = None if status == "ok" else Failure(phase="train", message="it was made up")
        write_result(result(status=status, failure=failure), tmp_path / "cells" / name / "attempt-1.json")
    write_result(result(attempt=2), tmp_path / "cells" / "again" / "attempt-2.json")
    (tmp_path / "cells" / "running" / "attempt-1.job.json").touch()
    (tmp_path / "cells.json").write_text(json.dumps({"cells": NAMES}))
    return tmp_path


def test_the_states_of_cells_with_and_without_a_launcher(run: Path, harness: object) -> None:
    ended = [
        CellState("ok", "finished", "ok"),
        CellState("oom", "finished", "oom"),
        CellState("error", "failed", "error"),
    ]
    again = CellState("again", "finished", "ok")
    left = [CellState("running", "not started", ""), CellState("new", "not started", "")]
    assert cell_states(run) == [*ended, again, *left]
    with launch.locked_run(run):
        (run / "cells" / "running" / "attempt-1.job.json").touch()  # the launcher has swept
        now = [CellState("running", "running", "this machine"), CellState("new", "waiting", "")]
        assert cell_states(run) == [*ended, again, *now]
    assert counts(cell_states(run)) == [
        ("finished", 3, "ok 2, oom 1"),
        ("running", 0, ""),
        ("waiting", 0, ""),
        ("failed", 1, "error 1"),
        ("not started", 2, ""),
    ]


def test_status_and_cancel_of_what_is_no_run_or_not_on_a_cluster(run: Path, harness: object) -> None:
    shown = harness.tpme_here("status", str(run))  # type: ignore[attr-defined]
    assert shown.returncode == 0
    assert [line.split() for line in shown.stdout.splitlines()[1:3]] == [
        ["finished", "3", "ok", "2,", "oom", "1"],
        ["running", "0"],
    ]
    assert json.loads(harness.tpme_here("status", str(run), "--json").stdout)[0] == {  # type: ignore[attr-defined]
        "folder": "ok",
        "state": "finished",
        "detail": "ok",
    }
    refused = harness.tpme_here("cancel", str(run))  # type: ignore[attr-defined]
    assert refused.returncode == 2
    assert "it has no jobs in Slurm" in refused.stderr
    with pytest.raises(UserError, match="no run folder of 'tpme run'"):
        cell_states(run / "cells")
