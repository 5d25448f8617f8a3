"""A sample of the users in place of all: which users, the same for every row, and what reports make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from tpme.bench.record import CellResult, DatasetFacts, Evaluation, RecordError, write_result
from tpme.bench.run.matrix import MatrixFile
from tpme.bench.side_files import UserRanks, damage, load_ranks, side_file
from tpme.bench.task.dataset import Dataset
from tpme.reports.board import write_board
from tpme.reports.compare import compare
from tpme.reports.data.export import records_frame
from tpme.reports.data.load import load, read, to_frame
from tpme.reports.report import make_report, write_report

pytestmark = pytest.mark.slow

Told = Callable[..., Path]
SAMPLE = {"users": 20, "seed": 3}


@pytest.fixture(scope="module")
def told(world: Any, harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """``told(evaluation)``: a run folder with the records of a few cheap rows."""

    def run(
        evaluation: dict[str, Any], methods: Sequence[str] = ("id", "popularity"), seeds: Sequence[int] = (1,)
    ) -> Path:
        root = tmp_path_factory.mktemp("run")
        for method in methods:
            for seed in seeds:
                matrix = world.matrix([method], evaluation=evaluation, seeds=[seed])
                folder = root / "cells" / f"{method}-{seed}"
                folder.mkdir(parents=True)
                write_result(world.tell(matrix, folder), folder / "attempt-1.json")
        return root

    return run


@pytest.fixture(scope="module")
def sampled(told: Told) -> Path:
    return told(SAMPLE)


@pytest.fixture(scope="module")
def whole(told: Told) -> Path:
    return told({})


def results(root: Path) -> list[CellResult]:
    return [recorded.result for recorded in read([root])]


def ranks(root: Path) -> list[UserRanks]:
    return [load_ranks(path) for recorded in read([root]) if (path := recorded.beside("ranks"))]


# --- which users ----------------------------------------------------------------------------------------------------


def drawn(world: Any, **evaluation: int) -> Dataset:
    dataset = Dataset.open(world.data)
    dataset.evaluate_on(Evaluation(**evaluation))
    return dataset


def test_a_sample_is_drawn_from_the_content_and_the_seed(world: Any) -> None:
    one, again, other = (drawn(world, users=20, seed=seed).evaluated for seed in (1, 1, 2))
    assert one is not None
    assert len(set(one.tolist())) == len(one) == 20
    assert one.tolist() == sorted(one.tolist()) == again.tolist() != other.tolist()
    dataset = Dataset.open(world.data)
    dataset.manifest = dataset.manifest.model_copy(update={"fingerprint": "0" * 64})
    dataset.evaluate_on(Evaluation(users=20, seed=1))
    assert dataset.evaluated.tolist() != one.tolist()


def test_every_user_is_as_likely_as_any_other(world: Any) -> None:
    users = Dataset.open(world.data).manifest.users
    times = np.zeros(users)
    for seed in range(200):
        times[drawn(world, users=users // 3, seed=seed).evaluated] += 1
    expected, deviation = 200 / 3, np.sqrt(200 * 2 / 9)
    assert np.abs(times - expected).max() < 4.5 * deviation


def test_validation_and_test_are_the_rows_of_the_sample(world: Any) -> None:
    every, dataset = Dataset.open(world.data), drawn(world, users=20)
    for name in ("valid", "test"):
        split, part = getattr(every, name), getattr(dataset, name)
        for array in ("inputs", "target", "history"):
            np.testing.assert_array_equal(getattr(part, array), getattr(split, array)[dataset.evaluated])
    np.testing.assert_array_equal(dataset.train_slots, every.train_slots)
    assert dataset.cold_test_share == every.cold_test_share
    assert (dataset.facts("d").evaluated_users, every.facts("d").evaluated_users) == (20, None)


@pytest.mark.parametrize("users", [60, 61, 10**9])
def test_a_sample_of_all_users_is_all_users(world: Any, users: int) -> None:
    assert drawn(world, users=users).evaluated is None


@pytest.mark.parametrize("wrong", [{"users": 0}, {"users": -1}, {"users": 2.5}, {"users": "all"}, {"user": 5}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Evaluation.model_validate(wrong)


def test_the_mistake_is_told_in_one_line(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    text = 'name = "m"\ndatasets = [{ name = "d", path = "/d" }]\nencoders = [{}]\nmethods = ["id"]\n[evaluation]\n'
    for line, message in (("users = 0", "evaluation.users"), ("user = 5", "did you mean evaluation.users?")):
        path.write_text(f"{text}{line}\n")
        done = harness.tpme_here("run", str(path))
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


# --- records --------------------------------------------------------------------------------------------------------


def test_records_say_which_users_of_how_many(sampled: Path, whole: Path, world: Any) -> None:
    expected = drawn(world, **SAMPLE)
    for result, of in zip(results(sampled), ranks(sampled), strict=True):
        assert (result.status, result.dataset.users, result.dataset.evaluated_users) == ("ok", 60, 20)
        assert result.cell.evaluation == Evaluation(**SAMPLE)
        np.testing.assert_array_equal(of.user, expected.evaluated)
        np.testing.assert_array_equal(of.target, expected.test.target)
        [flag] = [flag for flag in result.flags if flag.code == "sampled-users"]
        assert flag.message == ("validation and test rank the targets of 20 of 60 users, drawn at random with seed 3")
    for result, of in zip(results(whole), ranks(whole), strict=True):
        assert (result.dataset.evaluated_users, of.user, len(of.rank)) == (None, None, 60)
        assert not any("users" in flag.code for flag in result.flags)


def test_the_ranks_of_the_sample_are_those_of_these_users(sampled: Path, whole: Path) -> None:
    """Of popularity, which trains nothing that early stopping could change."""
    part, every = ranks(sampled)[-1], ranks(whole)[-1]
    for name in ("rank", "target", "cold", "in_history"):
        np.testing.assert_array_equal(getattr(part, name), getattr(every, name)[part.user])


def test_validation_is_that_of_the_sample(world: Any, tmp_path: Path) -> None:
    """A sample of one user has a Recall@10 of 0 or 1."""
    result = world.tell(world.matrix(["id"], evaluation={"users": 1}, training={"epochs": 3}), tmp_path)
    assert {epoch.valid_recall_10 for epoch in result.epochs} <= {0.0, 1.0}


def test_more_users_than_there_are_is_a_note(told: Told) -> None:
    [result] = results(told({"users": 1000}, ["popularity"], [1]))
    assert result.dataset.evaluated_users is None
    assert [flag.message for flag in result.flags if flag.code == "all-users"] == [
        "evaluation.users is 1,000, the data has 60: all were evaluated"
    ]


def test_a_sample_of_all_users_shares_a_frame_with_all_users(told: Told, whole: Path) -> None:
    asked = told({"users": 1000}, ["popularity"], [1])
    [section] = make_report([asked, whole]).sections
    assert section.group.key["evaluation"] == "all users"
    records = read([asked, whole])
    lost = [replace(one, result=one.result.model_copy(update={"dataset": None})) for one in records]
    assert set(to_frame(records)["evaluation"]) == set(to_frame([*lost, *records])["evaluation"]) == {"all users"}
    assert set(to_frame(lost)["evaluation"]) == {"all users", "1,000 test users, seed 12345"}, "nobody knows its data"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": None}, "does not say of which users"),
        ({"user": np.array([0, 2, 1, 3])}, "not rows of the data in rising order"),
        ({"user": np.array([0, 1, 1, 3])}, "not rows of the data in rising order"),
        ({"user": np.array([-1, 1, 2, 3])}, "not rows of the data in rising order"),
        ({"user": np.array([0.0, 1, 2, 3])}, "not rows of the data in rising order"),
        ({"user": np.array([0, 1, 2, 60])}, "user 60"),
        ({"user": np.array([0, 1, 2])}, "differ in length"),
        ({"rank": np.ones(5, np.int32)}, "differ in length"),
    ],
)
def test_users_that_cannot_be_are_refused(sampled: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recorded = read([sampled])[0]
    data = recorded.result.dataset.model_copy(update={"evaluated_users": 4})
    result = recorded.result.model_copy(update={"dataset": data, "files": {"ranks": "r.npz"}, "digests": {}})
    arrays: dict[str, Any] = {
        "rank": np.ones(4, np.int32),
        "target": np.ones(4, np.int32),
        "cold": np.zeros(4, bool),
        "in_history": np.zeros(4, bool),
        "user": np.arange(4),
    }
    np.savez(tmp_path / "r.npz", **arrays)
    assert damage(tmp_path / "a.json", result) is None
    np.savez(tmp_path / "r.npz", **{name: value for name, value in (arrays | changes).items() if value is not None})
    with pytest.raises(RecordError, match=message):
        side_file(tmp_path / "a.json", result, "ranks")


def test_users_in_the_ranks_of_all_are_refused(whole: Path, tmp_path: Path) -> None:
    recorded = read([whole])[0]
    arrays = dict(np.load(recorded.beside("ranks")))
    np.savez(tmp_path / "r.npz", **arrays, user=np.arange(60))
    result = recorded.result.model_copy(update={"files": {"ranks": "r.npz"}, "digests": {}})
    with pytest.raises(RecordError, match="says so of all"):
        side_file(tmp_path / "a.json", result, "ranks")


def test_the_facts_of_older_records_know_no_sample(whole: Path) -> None:
    facts = results(whole)[0].dataset.model_dump(exclude={"evaluated_users"})
    assert DatasetFacts.model_validate(facts).evaluated_users is None


# --- reports --------------------------------------------------------------------------------------------------------


def test_a_report_has_intervals_and_a_note_on_the_sample(sampled: Path, tmp_path: Path) -> None:
    [section] = make_report([sampled]).sections
    assert (section.summary["users"] == 20).all()
    assert (section.summary["recall_20_low"] <= section.summary["recall_20"]).all()
    assert (section.summary["recall_20"] <= section.summary["recall_20_high"]).all()
    note = "Validation and test rank the targets of 20 of 60 users, drawn at random with seed 3"
    assert note in section.notes.shared
    [one] = section.differences["recall"]
    assert {one.first, one.second} == {"id", "popularity"}
    write_report([sampled], tmp_path / "report", formats=["csv"])
    assert note in (tmp_path / "report" / "report.md").read_text() + (tmp_path / "report" / "details.md").read_text()


def test_rows_of_other_samples_are_other_groups(sampled: Path, whole: Path, told: Told) -> None:
    other = told(SAMPLE | {"seed": 4}, ["id"], [1])
    report = make_report([sampled, whole, other])
    assert sorted(section.group.key["evaluation"] for section in report.sections) == [
        "20 test users, seed 3",
        "20 test users, seed 4",
        "all users",
    ]
    assert len({section.name for section in report.sections}) == 3
    [mixed] = make_report([sampled, whole], mix=True).sections
    assert mixed.group.mixed == ("evaluation",)
    assert set(mixed.lines) == {
        f"{row} [{users}]" for row in ("id", "popularity") for users in ("20 test users", "all users")
    }
    assert mixed.differences == {"recall": (), "ndcg": ()}


def test_comparing_samples_leaves_quality_out_and_pairs_the_same_one(sampled: Path, whole: Path) -> None:
    [pair] = compare(sampled, whole).pairs
    for row in pair.rows:
        [recall] = [change for change in row.changes if change.key == "recall_10"]
        assert (recall.outcome, recall.reason) == ("not compared", "other test users")
    [pair] = compare(sampled, sampled).pairs
    for row in pair.rows:
        [recall] = [change for change in row.changes if change.key == "recall_10"]
        assert recall.outcome == "equal"


def test_targets_may_be_alike_and_the_users_others() -> None:
    one = UserRanks(*(np.ones(3, int) for _ in range(4)), user=np.array([0, 1, 2]))
    assert one.paired_with(replace(one, user=None))
    assert not one.paired_with(replace(one, user=np.array([0, 1, 3])))
    assert not one.paired_with(replace(one, target=np.array([1, 1, 2])))


def test_export_and_board_have_the_sample(sampled: Path, whole: Path, tmp_path: Path) -> None:
    frame = records_frame(read([sampled]))
    assert set(frame["evaluation"]) == {"20 test users, seed 3"}
    assert {json.loads(facts)["evaluated_users"] for facts in frame["dataset_facts"]} == {20}
    assert set(load([whole])["evaluation"]) == {"all users"}
    write_board([sampled, whole], tmp_path / "board")
    assert "20 test users, seed 3" in (tmp_path / "board" / "index.html").read_text()


def test_the_built_in_catalogue_can_do_without_images(world: Any) -> None:
    from tpme.bench.run.launch import prepare_datasets

    raw = {
        "name": "m",
        "datasets": [{"name": "d", "synthetic": {"users": 60, "items": 60}, "modalities": ["text"]}],
        "encoders": [{"text": {"source": str(world.text)}}],
        "methods": ["id"],
    }
    data = prepare_datasets(MatrixFile.model_validate(raw), world.store, Console(quiet=True))["d"]
    assert data.modalities == ("text",)
    both = raw | {"datasets": [{"name": "d", "synthetic": {"users": 60, "items": 60}}]}
    data = prepare_datasets(MatrixFile.model_validate(both), world.store, Console(quiet=True))["d"]
    assert data.modalities == ("text", "image")
    with pytest.raises(ValidationError, match="is of synthetic data"):
        MatrixFile.model_validate(raw | {"datasets": [{"name": "d", "path": "/d", "modalities": ["text"]}]})
