"""What of a matrix is finished, and how long the rest should take."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tpme.bench.record import CellResult, Failure, Reading, Status, write_result
from tpme.bench.run.job import Job
from tpme.bench.run.progress import remaining_table
from tpme.bench.run.remaining import Remaining, in_words, is_finished, latest_attempt, remaining
from tpme.bench.task import fingerprint
from tpme.bench.task.fingerprint import sha256_of


def finish(job: Job, status: Status = "ok", wall_s: float = 10.0) -> None:
    """Write a record of ``job``."""
    result = CellResult(
        cell_id=job.cell_id,
        attempt=1,
        cell=job.cell,
        code_version=job.code_version,
        status=status,
        failure=None if status == "ok" else Failure(phase="train", message="stopped"),
        started_at="2026-01-01T00:00:00+00:00",
        wall_s=wall_s,
        epoch_time_s=Reading.missing("clock", "no training"),
    )
    write_result(result, job.file(".json"))


def state_of(jobs: list[Job], run: Path) -> Remaining:
    return remaining(jobs, [latest_attempt(job).result for job in jobs], run)


@pytest.fixture
def jobs(world: Any, tmp_path: Path) -> list[Job]:
    """Two rows of three seeds each: id, then popularity."""
    found: list[Job] = world.jobs(world.matrix(["id", "popularity"], seeds=[1, 2, 3]), tmp_path)
    return sorted(found, key=lambda job: job.cell.method)


def test_the_time_of_what_is_missing_is_that_of_what_ended_well(jobs: list[Job], tmp_path: Path) -> None:
    assert state_of(jobs, tmp_path).text == (
        "0 of 6 cells finished, 6 to run; expected time not known: there is no finished record of the same row here."
    )
    finish(jobs[0], wall_s=20.0)
    finish(jobs[1], "oom", wall_s=1.0)
    assert state_of(jobs, tmp_path).text == (
        "2 of 6 cells finished (1 oom), 4 to run; expected time 20 s, without 3 of them: "
        "there is no finished record of the same row here."
    )
    finish(jobs[3], wall_s=200.0)
    assert state_of(jobs, tmp_path).text == "3 of 6 cells finished (1 oom), 3 to run; expected time 7 min."
    for job in (jobs[2], *jobs[4:]):
        finish(job)
    assert state_of(jobs, tmp_path).text == "6 of 6 cells finished (1 oom), nothing to run."


def test_a_killed_cell_is_still_to_run(jobs: list[Job], tmp_path: Path) -> None:
    finish(jobs[0], "killed")
    assert not is_finished(latest_attempt(jobs[0]).result, jobs[0])
    assert state_of(jobs, tmp_path).rows[0].missing == 3


def test_rows_are_listed_one_a_line(jobs: list[Job], tmp_path: Path) -> None:
    finish(jobs[0], wall_s=20.0)
    screen = io.StringIO()
    Console(file=screen, width=80).print(remaining_table(state_of(jobs, tmp_path)))
    assert [line.split("  ")[0].strip() for line in screen.getvalue().splitlines()] == ["Row", "id", "popularity"]
    _, first, second = (" ".join(line.split()) for line in screen.getvalue().splitlines())
    assert first == "id 1 of 3 2 40 s"
    assert second == "popularity 0 of 3 3 not known"


def test_rows_of_one_method_are_told_apart(world: Any, tmp_path: Path) -> None:
    matrix = world.matrix(
        ["frozen", "popularity"],
        axes={"users_per_batch": [8, 16]},
        modalities=["text"],
    )
    screen = io.StringIO()
    Console(file=screen, width=200).print(remaining_table(state_of(world.jobs(matrix, tmp_path), tmp_path)))
    rows = [line.split("  ")[0].strip() for line in screen.getvalue().splitlines()]
    assert rows == [
        "Row",
        *(f"{name}, users_per_batch={size}" for size in (8, 16) for name in ("frozen", "popularity")),
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "under a second"), (41.0, "41 s"), (150.0, "2 min"), (9000.0, "2.5 h")]
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_large_adapter_is_read_once(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, read = jobs[0].file(".adapter.safetensors"), []
    finish(jobs[0])
    record = CellResult.model_validate_json(jobs[0].file(".json").read_text())
    adapter.write_bytes(bytes(2**24))
    digest = sha256_of(adapter)
    changed = record.model_copy(update={"files": {"adapter": adapter.name}, "digests": {"adapter": digest}})
    jobs[0].file(".json").write_text(changed.model_dump_json())
    monkeypatch.setattr(fingerprint, "_TICK_NS", 0)
    monkeypatch.setattr("tpme.bench.run.remaining.sha256_of", lambda path: read.append(path) or sha256_of(path))
    job = jobs[0].model_copy(update={"store": tmp_path / "store"})
    assert [latest_attempt(job).damage for _ in range(3)] == [None, None, None]
    assert read == [adapter]
    with adapter.open("r+b") as file:
        file.write(b"x")
    assert "SHA-256 differs" in str(latest_attempt(job).damage)
