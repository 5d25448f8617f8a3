"""Launching a matrix: what runs, what runs again, and that one failing cell stops nothing."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, Reading, Status, find_results, read_result
from tpme.bench.run import attempt, launch
from tpme.bench.run.job import Job
from tpme.bench.run.launch import run_matrix, store_folder
from tpme.bench.run.matrix import MatrixFile
from tpme.bench.run.progress import outcome_line
from tpme.bench.run.remaining import Latest, latest_attempt

STUB = """
import json, os, signal, sys, time
from pathlib import Path
from tpme.bench.run.job import Job
from tpme.bench.record import CellResult, Failure, Reading, write_result
from tpme.bench.writing import write_atomically

job = Job.model_validate_json(Path(sys.argv[1]).read_bytes())
ending = json.loads(os.environ["STUB"])[str(job.cell.seed)]
with open(os.environ["STUB_RAN"], "a") as ran:
    ran.write(f"{job.cell.seed} ")
if ending == "silent":
    sys.exit("the last words\\n")
if ending == "half":
    job.file(".samples.npz").write_bytes(b"half")
    (job.folder / f".attempt-{job.attempt}.json.tmp").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
if ending == "sleep":
    print("slept", file=sys.stderr, flush=True)
    time.sleep(600)
if ending == "broken":
    write_atomically(job.file(".json"), b"{")
    sys.exit()
write_result(
    CellResult(
        cell_id=job.cell_id, attempt=job.attempt, cell=job.cell, code_version=job.code_version, status=ending,
        failure=None if ending == "ok" else Failure(phase="train", message="no [tag], [/red] or [bold]"),
        started_at="2026-01-01T00:00:00+00:00", wall_s=0.5, time_limit_s=job.time_limit_s,
        epoch_time_s=Reading.missing("clock", "stub"),
    ),
    job.file(".json"),
)
"""


class Stubbed:
    """Runs matrices of one method over seeds, each cell a stub that ends as it is told."""

    def __init__(self, world: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.run_folder, self.ran_file, self.patch = world, root / "run", root / "ran", monkeypatch
        script = root / "stub.py"
        script.write_text(STUB)
        monkeypatch.setattr(attempt, "command", lambda job_file, _python: [sys.executable, str(script), str(job_file)])
        monkeypatch.setenv("STUB_RAN", str(self.ran_file))
        self.said = ""

    def run(self, *endings: str, **settings: Any) -> list[CellResult]:
        """Run cells of the seeds 0, 1, ... that end like this; ``ran`` then says which of them ran."""
        self.ran_file.write_text("")
        self.patch.setenv("STUB", json.dumps(dict(enumerate(endings))))
        console = Console(file=io.StringIO(), width=200)
        try:
            return run_matrix(
                self.matrix(len(endings)),
                self.run_folder,
                store=self.world.store,
                device="cpu",
                console=console,
                **settings,
            )
        finally:
            self.said = console.file.getvalue()  # type: ignore[attr-defined]

    def matrix(self, seeds: int) -> MatrixFile:
        matrix: MatrixFile = self.world.matrix(["popularity"], seeds=list(range(seeds)))
        return matrix

    @property
    def ran(self) -> list[int]:
        """The seeds whose cells ran in the last call."""
        return [int(seed) for seed in self.ran_file.read_text().split()]

    def folder(self, seed: int) -> Path:
        found: Path = self.world.jobs(self.matrix(seed + 1), self.run_folder)[seed].folder
        return found


@pytest.fixture
def stubbed(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubbed:
    return Stubbed(world, tmp_path, monkeypatch)


def statuses(results: Sequence[CellResult]) -> list[Status]:
    return [result.status for result in results]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what runs, and what runs again ---------------------------------------------------------------------------------


def test_only_what_would_come_out_otherwise_runs_again(stubbed: Stubbed) -> None:
    ends: list[str] = ["ok", "oom", "diverged", "timeout", "skipped", "error", "killed"]
    assert statuses(stubbed.run(*ends)) == ends
    assert stubbed.ran == [0, 1, 2, 3, 4, 5, 6]
    results = stubbed.run(*["ok"] * 7)
    assert stubbed.ran == [5, 6]
    assert statuses(results) == [*ends[:5], "ok", "ok"]
    assert [result.attempt for result in results] == [1, 1, 1, 1, 1, 2, 2]
    assert names(stubbed.folder(5)) == ["attempt-1.json", "attempt-1.log", "attempt-2.json", "attempt-2.log"]
    assert len(find_results([stubbed.run_folder])) == 7
    stubbed.run(*["ok"] * 7)
    assert stubbed.ran == []


def test_a_timeout_runs_again_only_with_more_time(stubbed: Stubbed) -> None:
    stubbed.run("timeout", time_limit_s=50.0)
    for limit_s, ran in ((50.0, []), (40.0, []), (60.0, [0])):
        stubbed.run("timeout", time_limit_s=limit_s)
        assert stubbed.ran == ran
    assert stubbed.run("ok")[0].status == "ok"  # the matrix's own limit is longer still


def test_a_cell_whose_record_is_gone_or_unreadable_runs_again(stubbed: Stubbed) -> None:
    stubbed.run("ok", "ok", "ok")
    (stubbed.folder(0) / "attempt-1.json").unlink()
    (stubbed.folder(2) / "attempt-1.json").write_text('{"schema_version": 1, ')
    results = stubbed.run("ok", "ok", "ok")
    assert stubbed.ran == [0, 2]
    assert [result.attempt for result in results] == [1, 1, 2]
    assert (stubbed.folder(2) / "attempt-1.json").read_text() == '{"schema_version": 1, '


def test_more_seeds_run_only_the_new_ones(stubbed: Stubbed) -> None:
    stubbed.run("ok")
    stubbed.run("ok", "ok")
    assert stubbed.ran == [1]


def test_a_file_system_without_locks_is_enough(stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with launch.locked_run(stubbed.run_folder):
        assert names(stubbed.run_folder) == [".lock"]


@pytest.mark.slow
def test_a_changed_method_from_elsewhere_makes_its_own_cells_stale(stubbed: Stubbed, tmp_path: Path) -> None:
    mine = tmp_path / "methods"
    mine.mkdir()
    (mine / "mine.py").write_text("from tpme.methods.base import Method\nclass Mine(Method): pass\nMETHOD = Mine\n")
    matrix = stubbed.world.matrix(["popularity", "mine"])

    def ids() -> list[str]:
        # In a process of its own: a module is imported once.
        program = (
            "import sys; from pathlib import Path; from rich.console import Console\n"
            "from tpme.bench.run.launch import make_jobs; from tpme.bench.run.matrix import MatrixFile\n"
            "matrix, store, mine = MatrixFile.model_validate_json(sys.argv[1]), *map(Path, sys.argv[2:])\n"
            "jobs = make_jobs(matrix, Path(), store, device='cpu', methods_path=[mine], console=Console())\n"
            "print(*(job.cell_id for job in jobs))"
        )
        call = [sys.executable, "-c", program, matrix.model_dump_json(), str(stubbed.world.store), str(mine)]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()

    before = ids()
    (mine / "mine.py").write_text((mine / "mine.py").read_text() + "# better\n")
    after = ids()
    assert after[0] == before[0]
    assert after[1] != before[1]


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_cell_that_says_nothing_still_becomes_a_row(stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, half, good = stubbed.run("silent", "half", "ok")
    assert (silent.status, half.status, good.status) == ("error", "killed", "ok")
    assert silent.failure is not None
    assert silent.failure.message == "its process ended with code 1: the last words (log: attempt-1.log)"
    assert half.failure is not None
    assert half.failure.message.startswith("its process was ended by SIGKILL; the kernel does this when host memory")
    assert (half.cell, half.attempt, half.wall_s > 0) == (silent.cell.model_copy(update={"seed": 1}), 1, True)
    assert half.epoch_time_s.value is None
    assert read_result(stubbed.folder(1) / "attempt-1.json") == half
    # What it had half written is gone, what it said is not.
    assert names(stubbed.folder(1)) == ["attempt-1.json", "attempt-1.log"]


def test_a_cell_that_takes_too_long(stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch) -> None:
    late, good = stubbed.run("sleep", "ok", time_limit_s=3.0)
    assert (late.status, good.status) == ("timeout", "ok")
    assert late.failure is not None
    assert late.failure.message == "took longer than its time limit of 3 s; raise time_limit_s or --time-limit"
    assert late.time_limit_s == 3.0
    assert late.wall_s >= 3.0


def test_a_failed_cell_names_its_log(stubbed: Stubbed) -> None:
    stubbed.run("ok", "error")
    told = stubbed.said.splitlines()
    assert told[-1].strip() == f"log: {stubbed.folder(1) / 'attempt-1.log'}"
    assert (stubbed.folder(1) / "attempt-1.log").is_file()
    assert stubbed.said.count("log: ") == 1


def test_a_second_run_says_that_all_is_finished(stubbed: Stubbed) -> None:
    stubbed.run("ok", "oom")
    assert stubbed.said.startswith("0 of 2 cells finished, 2 to run; ")
    stubbed.run("ok", "ok")
    assert stubbed.said == "2 of 2 cells finished (1 oom), nothing to run.\n"


def test_without_a_terminal_there_is_a_line_now_and_then(stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpme.bench.run.progress.LINE_S", 0.5)
    stubbed.run("sleep", time_limit_s=2.0)
    lines = [line for line in stubbed.said.splitlines() if line.startswith("popularity (cell 1 of 1): start, 0%; ")]
    assert 2 <= len(lines) <= 5


def test_what_a_cell_says_is_printed_as_it_is(stubbed: Stubbed) -> None:
    stubbed.run("error", "ok")
    assert "popularity         error  no [tag], [/red] or [bold]" in stubbed.said
    assert "popularity         ok  0.5 s, nothing to train" in stubbed.said


def test_rounds_alone_are_not_nothing_to_train(stubbed: Stubbed) -> None:
    (good,) = stubbed.run("ok")
    federated = good.model_copy(update={"all_in_s": Reading(value=2.0, source="rounds")})
    assert outcome_line(federated).plain.endswith("0.5 s, 2.00 s all in")
    values = {"pass_s": 3.0, "valid_recall_10": 0.25}
    counters = {name: Reading(value=value, source="report()") for name, value in values.items()}
    measured = federated.model_copy(update={"counters": counters})
    assert outcome_line(measured).plain.endswith("0.5 s, 3.00 s a pass, validation Recall@10 0.2500")


def test_a_record_that_a_cell_wrote_badly_stops_nothing(stubbed: Stubbed) -> None:
    broken, good = stubbed.run("broken", "ok")
    assert (broken.status, good.status) == ("error", "ok")
    assert broken.failure is not None
    assert "its record cannot be read" in broken.failure.message
    assert read_result(stubbed.folder(0) / "attempt-1.json") == broken


# --- the run folder -------------------------------------------------------------------------------------------------


def test_what_lies_in_a_run_folder(stubbed: Stubbed) -> None:
    (result,) = stubbed.run("ok")
    assert names(stubbed.run_folder) == [".lock", "cells", "cells.json", "matrix.json"]
    assert MatrixFile.model_validate_json((stubbed.run_folder / "matrix.json").read_bytes()) == stubbed.matrix(1)
    assert stubbed.folder(0).name == f"popularity-{result.cell_id}"


def test_a_run_folder_names_the_cells_of_its_last_matrix(stubbed: Stubbed) -> None:
    stubbed.run("ok", "ok")
    stubbed.run("ok")
    assert len(names(stubbed.run_folder / "cells")) == 2
    assert json.loads((stubbed.run_folder / "cells.json").read_bytes()) == {"cells": [stubbed.folder(0).name]}


def test_a_finished_record_is_read_once(stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed.run("ok", "error", "oom")
    read: list[str] = []

    def counted(job: Job) -> Latest:
        read.append(job.folder.name)
        return latest_attempt(job)

    monkeypatch.setattr(launch, "latest_attempt", counted)
    stubbed.run("ok", "ok", "ok")
    assert [read.count(stubbed.folder(seed).name) for seed in range(3)] == [1, 2, 1]


def test_a_cell_that_another_launcher_finished_before_the_lock_does_not_run_again(
    stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = launch._announce

    def announce_after_another_run(*arguments: Any, **settings: Any) -> None:
        monkeypatch.setattr(launch, "_announce", announce)
        announce(*arguments, **settings)
        stubbed.run("ok")

    monkeypatch.setattr(launch, "_announce", announce_after_another_run)
    assert statuses(stubbed.run("error")) == ["ok"]
    assert stubbed.ran == [0]


def test_one_launcher_at_a_time(stubbed: Stubbed, tmp_path: Path) -> None:
    with launch.locked_run(stubbed.run_folder), pytest.raises(UserError, match="another 'tpme run' is using it"):
        stubbed.run("ok")
    assert stubbed.ran == []
    assert stubbed.run("ok")[0].status == "ok"


def test_the_built_in_catalogue_is_prepared_once_into_the_store(
    world: Any, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"name": "synthetic", "synthetic": {"users": 40, "items": 50}, "image_size": 16}
    matrix = world.matrix(["popularity"], datasets=[entry])
    console = Console(file=io.StringIO())
    first = launch.prepare_datasets(matrix, tmp_path, console)["synthetic"]
    assert first.path.parent == tmp_path / "datasets"
    assert set(first.modalities) == {"text", "image"}
    monkeypatch.setattr("tpme.bench.task.prepare.prepare", None)
    assert launch.prepare_datasets(matrix, tmp_path, console)["synthetic"] == first
    assert console.file.getvalue().count("Preparing") == 1  # type: ignore[attr-defined]
    bad = world.matrix(["popularity"], datasets=[entry | {"synthetic": {"user": 40}}])
    with pytest.raises(UserError, match=r"data set 'synthetic', synthetic\.user: "):
        launch.prepare_datasets(bad, tmp_path, console)


def test_a_data_set_that_is_not_there(world: Any, tmp_path: Path) -> None:
    matrix = world.matrix(["popularity"], datasets=[{"name": "d", "path": str(tmp_path / "nowhere")}])
    with pytest.raises(UserError, match="nowhere"):
        world.run(matrix, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TPME_STORE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert store_folder(None) == tmp_path / "home" / ".cache" / "tpme"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store_folder(None) == tmp_path / "cache" / "tpme"
    monkeypatch.setenv("TPME_STORE", str(tmp_path / "mine"))
    assert store_folder(None) == tmp_path / "mine"
    assert store_folder(tmp_path / "given") == tmp_path / "given"


# --- real cells -----------------------------------------------------------------------------------------------------


def test_every_card_method_runs(card_run: Any, harness: ModuleType) -> None:
    _, _, results = card_run
    assert {label: result.failure for label, result in results.items()} == dict.fromkeys(results)
    assert {result.cell.matrix for result in results.values()} == {"small"}
    assert [label for label, result in results.items() if result.cell.baseline] == ["frozen", "id", "popularity"]
    given = {"users": harness.USERS, "items": harness.ITEMS}
    assert all(result.dataset.synthetic == given for result in results.values())
    assert list(results) == ["fft", "lora", "prompt", "iisan", "iisan (cached)", "frozen", "id", "popularity"]


def test_a_second_run_does_nothing(card_run: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, folder, results = card_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.parent.name != folder.name}
    monkeypatch.setattr(attempt, "command", lambda *_: pytest.fail("a cell was started"))
    assert world.run(matrix, folder) == list(results.values())
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_ranks_of_every_user_are_kept(card_run: Any, harness: ModuleType) -> None:
    _, folder, results = card_run
    for path in find_results([folder]):
        result = read_result(path)
        assert set(result.files) == {"ranks", "samples"}
        with np.load(path.parent / result.files["ranks"]) as ranks:
            assert set(ranks) == {"rank", "target", "cold", "in_history"}
            assert {array.shape for array in ranks.values()} == {(harness.USERS,)}
            assert ranks["rank"].dtype == np.int32
            assert ranks["rank"].min() >= 1
            assert ranks["rank"].max() <= result.dataset.items
            assert (ranks["rank"][ranks["in_history"]] == result.dataset.items).all()
        with np.load(path.parent / result.files["samples"]) as samples:
            steps = sum(epoch.steps for epoch in result.epochs)
            assert samples["step_s"].shape == samples["step_epoch"].shape == (steps,)
            assert (samples["step_s"] > 0).all()
            assert list(samples["step_epoch"]) == [1, 1, 2, 2][:steps]
            assert samples["sample_t_s"].shape == samples["sample_bytes"].shape
            assert len(samples["sample_t_s"]) > 5
        # Every method ranks the same targets.
        assert result.dataset == results["fft"].dataset


def test_the_phases_add_up_to_the_wall_time(card_run: Any) -> None:
    for result in card_run[2].values():
        assert sum(phase.wall_s for phase in result.phases) == pytest.approx(result.wall_s, rel=0.01)
        kinds = [phase.kind for phase in result.phases if phase.kind != "load"]
        assert kinds[0] == ("cache" if result.cell.cached else "adapt")
        if result.epochs:
            trains = [phase.wall_s for phase in result.phases if phase.kind == "train"]
            assert trains == pytest.approx([epoch.train_s for epoch in result.epochs])
            assert result.training_memory.host_rss_bytes.value is not None
            build_s = result.cache.build_s if result.cache else 0.0
            assert result.all_in_s.value == pytest.approx(sum(trains) + build_s)
        else:
            assert result.cell.method == "popularity"
            assert kinds[:4] == ["adapt", "validate", "rank", "export"]
            assert result.all_in_s.reason == "nothing trains"


def test_a_cached_cell_never_holds_the_encoders(card_run: Any) -> None:
    results = card_run[2]
    plain, cached = results["iisan"], results["iisan (cached)"]
    encoders = plain.text_encoder.parameters + plain.image_encoder.parameters
    assert plain.parameters.total == cached.parameters.total + encoders
    assert cached.parameters.total == cached.parameters.trainable == plain.parameters.trainable
    assert (cached.text_encoder, cached.image_encoder) == (None, None)
    assert [phase.name for phase in cached.phases if phase.kind == "load"] == ["libraries", "data", "cache"]
    assert cached.cache.built_by_attempt
    assert cached.cache.encoders == {"text": plain.text_encoder, "image": plain.image_encoder}
    assert cached.cache.bytes == cached.counters["cache_bytes"].value
    assert cached.cache.peak_bytes.value > 0
    assert 0 < cached.cache.build_s < sum(phase.wall_s for phase in cached.phases if phase.kind == "cache")
    assert {part.built_by_attempt for part in cached.cache.parts.values()} == {True}
    assert {flag.message for flag in cached.flags if flag.code == "cache-placement"} == {
        "cached states are kept in host memory"
    }
    assert plain.cache is None
    # The same method on the same numbers, up to half precision.
    assert [epoch.loss for epoch in cached.epochs] == pytest.approx([epoch.loss for epoch in plain.epochs], rel=2e-3)


def test_one_failing_cell_stops_nothing(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    methods = tmp_path / "methods"
    harness.write_method(methods, "boom", "def adapt(self, model, schedule): raise ValueError('no\\nway')")
    deadly = "def adapt(self, model, schedule): import os; next(model.parameters()).is_meta or os.kill(os.getpid(), 9)"
    harness.write_method(methods, "fatal", deadly)
    boom, fatal, good = world.run(world.matrix(["boom", "fatal", "id"]), tmp_path / "run", methods_path=[methods])
    assert (boom.status, fatal.status, good.status) == ("error", "killed", "ok")
    assert (boom.failure.phase, boom.failure.message) == ("adapt", "ValueError: no way")
    assert "ValueError: no\nway" in (next((tmp_path / "run").glob("cells/boom-*")) / "attempt-1.log").read_text()
    assert boom.dataset == good.dataset
    assert [phase.kind for phase in boom.phases][-1] == "adapt"
