"""The files beside a record: what is refused before it is read, and why."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_record import result
from rich.console import Console

from tpme.bench import side_files
from tpme.bench.record import (
    Cell,
    CellResult,
    DatasetFacts,
    Reading,
    RecordError,
    cell_id,
    read_result,
    write_result,
)
from tpme.bench.run.job import Job
from tpme.bench.side_files import damage, load_ranks, load_samples, side_file

USERS, ITEMS = 5, 9
RANKS: dict[str, Any] = {
    "rank": np.array([1, 9, 3, 2, 4], np.int32),
    "target": np.array([1, 2, 9, 4, 5]),
    "cold": np.zeros(USERS, bool),
    "in_history": np.zeros(USERS, bool),
}
SAMPLES: dict[str, Any] = {
    "step_s": np.array([0.1, 0.2]),
    "step_epoch": np.array([1, 1]),
    "sample_t_s": np.array([0.0, 0.5, 1.0]),
    "sample_bytes": np.array([1.0, np.nan, 3.0]),
}


def evaluated(**changes: Any) -> CellResult:
    data = DatasetFacts(
        name="d",
        fingerprint="f",
        users=USERS,
        items=ITEMS,
        interactions=50,
        items_never_trained=0,
        modalities=("text",),
    )
    return result(**({"dataset": data, "files": {"ranks": "attempt-1.ranks.npz"}} | changes))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The place of a record with whole ranks beside it."""
    np.savez_compressed(tmp_path / "attempt-1.ranks.npz", **RANKS)
    return tmp_path / "attempt-1.json"


def ranks_file(record: Path) -> Path:
    return record.with_name("attempt-1.ranks.npz")


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def declared_shorter(data: bytes, size: int) -> bytes:
    """A zip archive of one member whose directory and header say that it unpacks to ``size`` bytes."""
    header = data.index(b"PK\x01\x02")
    short = size.to_bytes(4, "little")
    return data[:22] + short + data[26 : header + 24] + short + data[header + 28 :]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.place,)


def test_whole_files_are_read(record: Path) -> None:
    digest = hashlib.sha256(ranks_file(record).read_bytes()).hexdigest()
    for digests in ({}, {"ranks": digest}):
        assert side_file(record, evaluated(digests=digests), "ranks") == ranks_file(record)
        assert damage(record, evaluated(digests=digests)) is None
    assert side_file(record, evaluated(), "samples") is None


def test_a_file_that_was_not_recorded_is_refused(record: Path) -> None:
    with pytest.raises(RecordError, match=r"ranks\.npz: it is not the file that was recorded"):
        side_file(record, evaluated(digests={"ranks": "0" * 64}), "ranks")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": RANKS["rank"].astype(float)}, "are integers, not float64"),
        ({"target": RANKS["target"] + 0.5}, "are integers"),
        ({"rank": np.array([1, 2, 3, 4, 10])}, "rank or item 10 in a catalogue of 9"),
        ({"target": np.array([1, 2, 3, 4, 2**40])}, "rank or item 1,099,511,627,776 in a catalogue of 9"),
        ({"rank": np.array([1, 2, 3, 4, 0])}, "ranks and targets start at 1, this holds 0"),
        ({"rank": np.array([1, 2, 3, 4])}, "differ in length"),
        ({name: values[:0] for name, values in RANKS.items()}, "holds no rank"),
        ({name: values[:4] for name, values in RANKS.items()}, "4 ranks of 5 users"),
        ({"rank": RANKS["rank"][None]}, "one dimension"),
        ({"rank": np.array(["1", "2", "3", "4", "5"])}, "not a readable .npz"),
    ],
)
def test_impossible_ranks_are_refused(record: Path, changes: dict[str, Any], message: str) -> None:
    np.savez(ranks_file(record), **(RANKS | changes))
    with pytest.raises(RecordError, match=message) as caught:
        side_file(record, evaluated(), "ranks")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(ranks_file(record)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_s": np.array([0.1])}, "differ in length"),
        ({"sample_bytes": np.array([1.0, 2.0])}, "differ in length"),
        ({"step_s": np.array([0.1, -0.1])}, "negative or not finite"),
        ({"sample_t_s": np.array([0, 1, np.nan])}, "negative or not finite"),
    ],
)
def test_impossible_samples_are_refused(record: Path, changes: dict[str, Any], message: str) -> None:
    file = record.with_name("s.npz")
    np.savez(file, **SAMPLES)
    assert len(load_samples(file).step_s) == 2
    np.savez(file, **(SAMPLES | changes))
    with pytest.raises(RecordError, match=message):
        load_samples(file)
    assert message.split()[0] in str(damage(record, evaluated(files={"samples": "s.npz"})))


def test_no_pickle_is_loaded(record: Path, tmp_path: Path) -> None:
    pickled = npy(np.array([Bomb(tmp_path / "there")], dtype=object))
    np.load(io.BytesIO(pickled), allow_pickle=True)
    assert (tmp_path / "there").is_dir(), "the trap works"
    pickled = npy(np.array([Bomb(tmp_path / "ran")], dtype=object))
    ranks_file(record).write_bytes(zipped({f"{name}.npy": pickled for name in RANKS}))
    with pytest.raises(RecordError, match="not a readable"):
        load_ranks(ranks_file(record))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: zipped({"rank.npy": bytes(2**27)}), id="declared"),
        pytest.param(lambda: declared_shorter(zipped({"rank.npy": bytes(2**27)}), 1000), id="real"),
        pytest.param(lambda: declared_shorter(zipped({"rank.npy": bytes(2**27)}, zipfile.ZIP_LZMA), 99), id="lzma"),
    ],
)
def test_a_bomb_is_refused_before_it_unpacks(
    record: Path, content: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "MOST_BYTES", 2**25)
    ranks_file(record).write_bytes(content())
    tracemalloc.start()
    with pytest.raises(RecordError, match=r"ranks\.npz: "):
        load_ranks(ranks_file(record))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 96e6


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link", "nothing"])
def test_only_regular_files_of_the_folder_are_opened(record: Path, tmp_path: Path, kind: str) -> None:
    file = ranks_file(record)
    file.rename(tmp_path / "moved")
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
        "link": lambda: file.symlink_to(tmp_path / "moved"),
        "nothing": lambda: None,
    }
    make[kind]()
    started = time.monotonic()
    with pytest.raises(RecordError, match="no such file" if kind == "nothing" else "not a regular file"):
        side_file(record, evaluated(), "ranks")
    assert time.monotonic() - started < 5


# --- what a run does about it ---------------------------------------------------------------------------------------


def recorded(folder: Path, result: CellResult) -> Path:
    """Rewrite the record of a cell that a stub ran, with ranks and samples beside it; returns its path."""
    path = folder / "attempt-1.json"
    np.savez(folder / "attempt-1.ranks.npz", **RANKS)
    np.savez(folder / "attempt-1.samples.npz", **SAMPLES)
    files = {name: f"attempt-1.{name}.npz" for name in ("ranks", "samples")}
    digests = {name: hashlib.sha256((folder / file).read_bytes()).hexdigest() for name, file in files.items()}
    path.unlink()
    write_result(result.model_copy(update={"files": files, "digests": digests}), path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_another_cell(path: Path) -> None:
    """The record of the same method with another seed, whole in itself."""
    record = json.loads(path.read_bytes())
    record["cell"]["seed"] = 77
    record["cell_id"] = cell_id(Cell.model_validate(record["cell"]), record["code_version"])
    path.write_text(json.dumps(record))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "record cut": ("attempt-1.json", cut),
    "record emptied": ("attempt-1.json", lambda path: path.write_bytes(b"")),
    "record of another cell": ("attempt-1.json", of_another_cell),
    "record with another seed": (
        "attempt-1.json",
        lambda path: path.write_text(
            path.read_text().replace('"seed": 0', '"seed": 5').replace('"seed":0', '"seed":5')
        ),
    ),
    "record with a negative time": (
        "attempt-1.json",
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"wall_s": -1})),
    ),
    "ranks deleted": ("attempt-1.ranks.npz", Path.unlink),
    "ranks cut": ("attempt-1.ranks.npz", cut),
    "ranks changed": ("attempt-1.ranks.npz", flip),
    "ranks a pipe": ("attempt-1.ranks.npz", lambda path: (path.unlink(), os.mkfifo(path))),
    "samples deleted": ("attempt-1.samples.npz", Path.unlink),
    "samples changed": ("attempt-1.samples.npz", flip),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cell_is_measured_again_and_named(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from tpme.bench.run import launch
    from tpme.bench.run.engines import local
    from tpme.reports.data.load import read_every

    ran: list[int] = []

    def stub(job: Job, **_: Any) -> CellResult:
        ran.append(job.attempt)
        reading = Reading.missing("clock", "stub")
        plain = evaluated(cell_id=job.cell_id, attempt=job.attempt, cell=job.cell, code_version=job.code_version)
        made = plain.model_copy(update={"files": {}, "epoch_time_s": reading})
        write_result(made, job.file(".json"))
        return made

    def run() -> str:
        console = Console(file=io.StringIO(), width=500)
        launch.run_matrix(matrix, tmp_path / "run", store=world.store, device="cpu", console=console)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(local, "run_job", stub)
    matrix = world.matrix(["popularity"], seeds=[0])
    run()
    (folder,) = (tmp_path / "run" / "cells").iterdir()
    path = recorded(folder, read_result(folder / "attempt-1.json"))
    assert "nothing to run" in run()
    name, spoil = DAMAGES[kind]
    spoil(folder / name)
    with pytest.raises(RecordError, match=name) if kind != "record of another cell" else nullcontext():
        [one.beside(file) for one in read_every([tmp_path / "run"]) for file in one.result.files]
    said = run()
    assert str(folder / name) in said
    assert "its cell is measured again" in said
    assert ran == [1, 2]
    assert "nothing to run" in run(), "the damaged attempt no longer counts"
    assert ran == [1, 2]
    every = read_every([tmp_path / "run"])
    assert every[0].result.attempt == 2
    assert path.exists() or name == path.name
