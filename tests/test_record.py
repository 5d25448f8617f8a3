"""Records: what they refuse to say, how they reach the disk, and how the latest of a cell is found."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plain_record import CELL, result
from pydantic import ValidationError

from tpme.bench.errors import UserError
from tpme.bench.record import (
    HELD_OUT,
    PASS_S,
    TRAINING_OPTIONS,
    Cell,
    EncoderSpec,
    Epoch,
    Evaluation,
    Failure,
    ImportSource,
    NamedMetric,
    Reading,
    RecordError,
    Training,
    attempt_number,
    cell_id,
    find_results,
    read_result,
    write_result,
)

# --- what a record cannot say ---------------------------------------------------------------------------------------


def test_a_missing_value_says_why() -> None:
    reading = Reading.missing("NVML", "no GPU")
    assert (reading.value, reading.valid, reading.reason) == (None, False, "no GPU")
    for settings in ({"value": None}, {"value": 1.0, "valid": False}, {"value": None, "valid": False, "reason": ""}):
        with pytest.raises(ValidationError, match="needs a reason"):
            Reading(source="clock", **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Reading(value=value, source="clock")
    with pytest.raises(ValidationError, match="finite"):
        result(wall_s=value)


def test_memory_of_rounds_that_an_earlier_attempt_finished_says_why_it_is_missing() -> None:
    in_rounds = result(counters={PASS_S: Reading(value=2.0, source="report()")})
    assert in_rounds.pass_memory is not None
    reading = in_rounds.pass_memory.host_rss_bytes
    assert (reading.value, reading.valid) == (None, False)
    assert reading.reason is not None
    assert reading.reason.startswith("all rounds were finished in earlier attempts")
    assert result().pass_memory is None


def test_an_epoch_without_all_users_is_flagged() -> None:
    kept = result(counters={HELD_OUT: Reading(value=100.0, source="report()")}).held_out_flag
    assert kept is not None
    assert (
        kept.message
        == "an epoch trains on all users but 100 (its counter projection_users), so T is that of fewer steps"
    )
    assert result().held_out_flag is None


@pytest.mark.parametrize("status", ["oom", "diverged", "timeout", "killed", "error", "skipped"])
def test_what_did_not_go_well_says_where_and_why(status: str) -> None:
    with pytest.raises(ValidationError, match=f"ended as '{status}' must say where and why"):
        result(status=status)
    assert result(status=status, failure=Failure(phase="train", message="it broke")).failure is not None


def test_records_are_immutable_and_know_all_their_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        result().status = "oom"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        result(epoch_time=3)
    with pytest.raises(ValidationError, match="status"):
        result(status="fine")


def test_a_label_tells_cached_rows_apart() -> None:
    assert CELL.label == "lora"
    assert CELL.model_copy(update={"cached": True}).label == "lora (cached)"


# --- on the disk ----------------------------------------------------------------------------------------------------


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "cells" / "x" / "attempt-1.json"
    written = result(status="oom", failure=Failure(phase="train", message="é", epoch=1, step=2, bytes_requested=3))
    write_result(written, path)
    assert read_result(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["attempt-1.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "attempt-1.json"
    write_result(result(), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_result(result(wall_s=9.0), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema_version": 2, "cell_id"', "not a readable record"),
        (b"\xff\xfe", "not a readable record"),
        (b"[" * 100_000, "not a readable record"),
        (b"[]", "schema version None, this tpme reads 1 to 2"),
        (b'{"schema_version": 0}', "schema version 0, this tpme reads 1 to 2; use the tpme that wrote it"),
        (b'{"schema_version": 3}', "schema version 3, this tpme reads 1 to 2; use the tpme that wrote it"),
        (b'{"schema_version": [2]}', r"schema version \[2\], this tpme reads 1 to 2; use the tpme that wrote it"),
        (b'{"schema_version": 1}', "field 'cell_id': Field required; the record was changed or truncated"),
        (b'{"schema_version": 2}', "field 'cell_id': Field required; the record was changed or truncated"),
        (b'{"schema_version": 1, "cell": 3}', "field 'cell_id': Field required; the record was changed or truncated"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "attempt-1.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as error:
        read_result(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UserError)


def test_a_changed_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attempt-1.json"
    write_result(result(), path)
    raw = json.loads(path.read_bytes())
    raw["epoch_time_s"]["value"] = None
    path.write_text(json.dumps(raw))
    with pytest.raises(RecordError, match=r"field 'epoch_time_s': .*needs a reason"):
        read_result(path)


READING = {"value": -0.5, "source": "clock", "valid": True, "reason": None}
MADE_UP: dict[str, tuple[dict[str, Any], str]] = {
    "negative wall time": ({"wall_s": -1.0}, "wall_s"),
    "endless wall time": ({"wall_s": 1e300}, "wall_s"),
    "time in quotes": ({"wall_s": "1.5"}, "wall_s"),
    "time that is true": ({"wall_s": True}, "wall_s"),
    "attempt in quotes": ({"attempt": "1"}, "attempt"),
    "attempt that is true": ({"attempt": True}, "attempt"),
    "attempt 1.5": ({"attempt": 1.5}, "attempt"),
    "attempt 0": ({"attempt": 0}, "attempt"),
    "negative epoch time": ({"epoch_time_s": READING}, "epoch_time_s"),
    "reading in quotes": ({"epoch_time_s": READING | {"value": "0.5"}}, "epoch_time_s.value"),
    "negative all-in time": ({"all_in_s": READING}, "all_in_s"),
    "negative time of a pass": ({"counters": {"pass_s": READING}}, "cannot be negative"),
    "validation above 1": ({"counters": {"valid_recall_10": READING | {"value": 2}}}, "valid_recall_10"),
    "warm-up of -1 epochs": ({"warmup_epochs": -1}, "warmup_epochs"),
    "best epoch 0": ({"best_epoch": 0}, "best_epoch"),
    "limit of 0 s": ({"time_limit_s": 0}, "time_limit_s"),
    "no time": ({"started_at": "yesterday"}, "started_at"),
    "no status": ({"status": "fine"}, "status"),
    "no files": ({"files": ["ranks"]}, "files"),
    "file elsewhere": ({"files": {"ranks": "../../ranks.npz"}}, "files.ranks"),
    "absolute file": ({"files": {"ranks": "/dev/zero"}}, "files.ranks"),
    "file without a name": ({"files": {"ranks": ""}}, "files.ranks"),
    "file with NUL": ({"files": {"ranks": "a\0b"}}, "files.ranks"),
    "digest that is none": ({"files": {"ranks": "r.npz"}, "digests": {"ranks": "abc"}}, "digests.ranks"),
    "digest of nothing": ({"digests": {"ranks": "0" * 64}}, "none of its files"),
    "another cell": ({"cell": CELL.model_dump(mode="json") | {"seed": 7}}, "cell_id"),
    "another version": ({"code_version": "w"}, "cell_id"),
    "another id": ({"cell_id": "0123456789ab"}, "cell_id"),
    "seed in quotes": ({"cell": CELL.model_dump(mode="json") | {"seed": "12345"}}, "cell.seed"),
    "Recall of 2": ({"epochs": [{"valid_recall_10": 2}]}, "epochs.0.valid_recall_10"),
    "negative NDCG": ({"epochs": [{"valid_ndcg_10": -0.1}]}, "epochs.0.valid_ndcg_10"),
    "negative training time": ({"epochs": [{"train_s": -1}]}, "epochs.0.train_s"),
    "half a step": ({"epochs": [{"steps": 0.5}]}, "epochs.0.steps"),
    "epoch 0": ({"epochs": [{"index": 0}]}, "epochs.0.index"),
    "loss without bounds": ({"epochs": [{"loss": float("inf")}]}, "epochs"),
    "negative users": ({"dataset": {"users": -1}}, "dataset.users"),
    "items without end": ({"dataset": {"items": 2**80}}, "dataset.items|64 bits"),
}
EPOCH = {"index": 1, "train_s": 0.5, "steps": 3, "loss": 2.0, "valid_recall_10": 0.1, "valid_ndcg_10": 0.05}
DATA = {
    "name": "d", "fingerprint": "f", "users": 9, "items": 8, "interactions": 45, "items_never_trained": 1,
    "modalities": ["text"],
}  # fmt: skip


@pytest.mark.parametrize("change", MADE_UP)
def test_an_impossible_record_is_refused_in_one_line(tmp_path: Path, change: str) -> None:
    path = tmp_path / "attempt-1.json"
    changes, message = MADE_UP[change]
    whole = json.loads(result().model_dump_json()) | {"epochs": [EPOCH], "dataset": DATA}
    path.write_text(json.dumps(whole))
    assert read_result(path).epochs[0].steps == 3
    epochs = [EPOCH | epoch for epoch in changes.get("epochs", [{}])]
    path.write_text(json.dumps(whole | changes | {"epochs": epochs, "dataset": DATA | changes.get("dataset", {})}))
    with pytest.raises(RecordError, match=message) as error:
        read_result(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_a_record_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "attempt-1.json"
    {"fifo": os.mkfifo, "folder": Path.mkdir, "device": lambda p: p.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(RecordError, match="not a regular file"):
        read_result(path)


@pytest.mark.parametrize("content", [b'{"a":' * 100_000, b'{"attempt": ' + b"9" * 10_000 + b"}", b"\xff", b"\0"])
def test_what_no_parser_can_take_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "attempt-1.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="not a readable record"):
        read_result(path)


# --- earlier versions -----------------------------------------------------------------------------------------------

VERSION_1 = """{
 "schema_version": 1, "cell_id": "d101e2ee631f", "attempt": 1, "code_version": "v", "status": "ok", "wall_s": 1.5,
 "cell": {"method": "frozen", "cached": true, "dataset": "d", "dataset_fingerprint": "f", "modalities": ["text"]},
 "started_at": "2026-01-01T00:00:00+00:00",
 "dataset": {
  "name": "d", "fingerprint": "f", "users": 9, "items": 8, "interactions": 45, "items_never_trained": 1,
  "modalities": ["text"]
 },
 "epochs": [{"index": 1, "train_s": 0.5, "steps": 3, "loss": 2.0, "valid_recall_10": 0.1, "valid_ndcg_10": 0.05}],
 "epoch_time_s": {"value": 0.5, "source": "clock", "valid": true, "reason": null},
 "cache": {"build_s": 4.2, "bytes": 640, "items": 8, "dtype": "float16", "built_by_attempt": false, "encoders": {}}
}"""


def test_a_record_of_version_1_is_read_as_one_of_version_2(tmp_path: Path) -> None:
    path = tmp_path / "attempt-1.json"
    path.write_text(VERSION_1)
    old = read_result(path)
    assert (old.schema_version, old.cell.baseline, old.cell.matrix, old.cell.task) == (2, True, None, "recommendation")
    assert cell_id(old.cell, "v") == old.cell_id
    assert (old.metrics, old.source, old.epochs[0].stage) == ({}, None, "")
    assert old.cache is not None
    assert (old.cache.build_s, old.cache.peak_bytes.valid) == (4.2, False)
    assert old.cache.peak_bytes.reason == "the record is of schema version 1"
    assert old.dataset is not None
    assert (old.dataset.source, old.dataset.synthetic, old.dataset.image_size) == (None, None, None)
    again = tmp_path / "attempt-2.json"
    write_result(old, again)
    assert read_result(again) == old
    assert path.read_text() == VERSION_1


@pytest.mark.parametrize(("method", "baseline"), [("frozen", True), ("id", True), ("popularity", True), ("ids", False)])
def test_version_1_knew_three_baselines(tmp_path: Path, method: str, baseline: bool) -> None:
    path = tmp_path / "attempt-1.json"
    raw = json.loads(VERSION_1)
    raw["cell"]["method"] = method
    raw["cell_id"] = cell_id(Cell(**raw["cell"]), "v")
    path.write_text(json.dumps(raw))
    assert read_result(path).cell.baseline is baseline
    path.write_text(json.dumps(raw | {"schema_version": 2}))
    assert read_result(path).cell.baseline is False


def test_a_record_from_before_a_setting_keeps_its_identity(tmp_path: Path) -> None:
    """The first records know no ``cuda_graphs``; another value of what they do know is another cell."""
    path, raw = tmp_path / "attempt-1.json", json.loads(VERSION_1)
    training = Training().model_dump(exclude={"cuda_graphs", *TRAINING_OPTIONS})
    raw["cell"] |= {"training": training}
    raw["cell_id"] = hashlib.sha256(
        f"v\n{json.dumps(raw['cell'], sort_keys=True, separators=(',', ':'))}".encode()
    ).hexdigest()[:12]
    path.write_text(json.dumps(raw))
    assert read_result(path).cell.training == Training()
    training["epochs"] += 1
    path.write_text(json.dumps(raw))
    with pytest.raises(RecordError, match="it is not the id of the cell"):
        read_result(path)


def test_a_cells_identity_is_what_runs() -> None:
    """Not which matrix asked for it, nor how its row is treated."""
    identity = cell_id(CELL, "v")
    assert identity == "a56fc6ae3004"
    for field, value in {"matrix": "m", "baseline": True, "lr_trial": 1, "lr_trials": 2}.items():
        assert cell_id(CELL.model_copy(update={field: value}), "v") == identity
    for field, value in {"task": "retrieval", "seed": 1, "dataset": "e", "settings": {"batch": 4}}.items():
        assert cell_id(CELL.model_copy(update={field: value}), "v") != identity


def test_a_sample_of_users_is_part_of_the_identity_where_there_is_one() -> None:
    assert cell_id(CELL.model_copy(update={"evaluation": Evaluation(seed=7)}), "v") == "a56fc6ae3004"
    identities = {
        cell_id(CELL.model_copy(update={"evaluation": evaluation}), "v")
        for evaluation in (Evaluation(), Evaluation(users=10), Evaluation(users=11), Evaluation(users=10, seed=7))
    }
    assert len(identities) == 4


def test_a_cell_of_another_task_survives_the_disk(tmp_path: Path) -> None:
    cell = Cell(
        task="classification", settings={"model": "tiny", "batch": [4, 8]}, method="lora", dataset="reviews",
        dataset_fingerprint="", modalities=(),
    )  # fmt: skip
    epoch = Epoch(index=1, train_s=2.0, steps=250, loss=None, metrics={"accuracy": 0.7})
    metric = NamedMetric(value=Reading(value=0.7, source="the run"), higher_is_better=True)
    source = ImportSource(name="a suite", reference="https://a.example", commit="abc", definitions={"T": "all epochs"})
    written = result(cell=cell, epochs=(epoch,), time_of="250 steps", metrics={"accuracy": metric}, source=source)
    write_result(written, tmp_path / "attempt-1.json")
    read = read_result(tmp_path / "attempt-1.json")
    assert read == written
    assert (read.cell_id, read.time_of, read.epochs[0].valid_recall_10) == (cell_id(cell, "v"), "250 steps", None)


@pytest.mark.parametrize("option", [{"tower": "text"}, {"pool": "mean"}, {"dtype": "bf16"}, {"attention": "eager"}])
def test_an_option_of_an_encoder_is_part_of_the_identity_unless_it_is_the_default(option: dict[str, str]) -> None:
    plain = CELL.model_copy(update={"text_encoder": EncoderSpec(source="a")})
    assert cell_id(plain, "v") == "f1e050d56325"
    assert cell_id(CELL.model_copy(update={"text_encoder": EncoderSpec(source="a", **option)}), "v") != "f1e050d56325"


# --- finding them ---------------------------------------------------------------------------------------------------


def test_the_latest_attempt_of_each_cell_counts(tmp_path: Path) -> None:
    for name, attempts in (("a", (1, 2, 10)), ("b", (1,))):
        for number in attempts:
            write_result(result(attempt=number), tmp_path / "cells" / name / f"attempt-{number}.json")
    found = [path.relative_to(tmp_path).as_posix() for path in find_results([tmp_path])]
    assert found == ["cells/a/attempt-10.json", "cells/b/attempt-1.json"]
    # A launcher that was killed leaves the job of its cell behind: no record.
    (tmp_path / "cells" / "c").mkdir()
    for folder in ("b", "c"):
        (tmp_path / "cells" / folder / "attempt-2.job.json").write_text("{}")
    assert len(find_results([tmp_path])) == 2
    alone = tmp_path / "cells" / "a" / "attempt-2.json"
    assert find_results([alone]) == [alone]
    with pytest.raises(RecordError, match="nowhere: no such file or folder"):
        find_results([tmp_path / "nowhere"])


def test_attempt_numbers() -> None:
    assert [attempt_number(Path(name)) for name in ("attempt-3.json", "renamed.json", "attempt-3.job.json")] == [
        3,
        0,
        0,
    ]


def test_records_need_neither_torch_nor_pandas() -> None:
    program = "import sys, tpme.bench.record; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "pydantic" in loaded
    assert not {"torch", "numpy", "pandas", "transformers", "matplotlib", "rich", "typer"} & set(loaded)
