"""Preparing: the rules against a plain reading of them, bad images, what may stand at the destination, interruption."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from tpme.bench import cli
from tpme.bench.errors import UserError
from tpme.bench.task import workspace
from tpme.bench.task.dataset import FORMAT_VERSION, Dataset, Manifest
from tpme.bench.task.prepare import prepare, select
from tpme.bench.task.sources.raw import RawData


@dataclass(frozen=True)
class Shade:
    """A picture of one shade, or one that cannot be read."""

    shade: int
    bad: bool = False

    def __call__(self, size: int) -> NDArray[np.uint8]:
        if self.bad:
            raise UserError(f"{self.shade}.jpg: unreadable image (truncated)")
        return np.full((3, size, size), self.shade, np.uint8)


def make_raw(histories: list[list[int]], items: int = 8, *, bad: tuple[int, ...] = ()) -> RawData:
    """Items i0, i1, ... with shades 0, 1, ...; pictures of ``bad`` cannot be read."""
    return RawData(
        name="toy",
        items=[f"i{n}" for n in range(items)],
        titles=[f"title {n}" for n in range(items)],
        pictures=[Shade(n, n in bad) for n in range(items)],
        users=[f"u{n}" for n in range(len(histories))],
        histories=[np.array(history, np.int32) for history in histories],
        skipped={},
    )


def names(dataset: Dataset) -> dict[str, list[str]]:
    """Kept histories by user, as item names."""
    bounds = zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    return {
        user: [dataset.item_names[i] for i in dataset.sequences[start:end]]
        for user, (start, end) in zip(dataset.user_names, bounds, strict=True)
    }


@pytest.fixture(autouse=True)
def _workers_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are fresh: they import the pictures above, and get this process's path for it."""
    root = Path(__file__).resolve().parents[len(__name__.split(".")) - 1]
    monkeypatch.syspath_prepend(root)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "place" / "data"


def prepared(raw: RawData, destination: Path, *, image_size: int = 2, skip_bad: bool = False) -> Dataset:
    prepare(raw, destination, image_size=image_size, skip_bad=skip_bad)
    return Dataset.open(destination)


# --- the rules ---------------------------------------------------------------------------------------------


@given(
    histories=st.lists(st.lists(st.integers(0, 7), max_size=12), max_size=8),
    last=st.integers(3, 8),
    shortest=st.integers(3, 6),
    dropped=st.sets(st.integers(0, 7), max_size=3),
)
def test_the_rules_as_one_would_write_them_by_hand(
    histories: list[list[int]], last: int, shortest: int, dropped: set[int]
) -> None:
    good = [[item for item in history if item not in dropped] for history in histories]
    expected = {user: history[-last:] for user, history in enumerate(good) if len(history) >= shortest}
    mask = np.isin(np.arange(8), list(dropped))
    raw = make_raw(histories)
    if not expected:
        with pytest.raises(UserError, match="nothing to prepare"):
            select(raw, last=last, min_interactions=shortest, dropped=mask)
        return
    kept = select(raw, last=last, min_interactions=shortest, dropped=mask)
    used = sorted({item for history in expected.values() for item in history})
    assert kept.items.tolist() == used
    assert kept.users.tolist() == list(expected)
    ids = {item: number for number, item in enumerate(used, start=1)}
    sequences = [part.tolist() for part in np.split(kept.sequences, kept.offsets[1:-1])]
    assert sequences == [[ids[item] for item in history] for history in expected.values()]


def test_ids_titles_and_images_belong_together(destination: Path) -> None:
    dataset = prepared(make_raw([[6, 2, 2, 4, 6]]), destination)
    assert dataset.item_names == ["", "i2", "i4", "i6"]
    assert dataset.titles is not None
    assert list(dataset.titles) == ["", "title 2", "title 4", "title 6"]
    assert dataset.images is not None
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert dataset.manifest.model_dump(exclude={"fingerprint"}) == {
        "format_version": 1,
        "name": "toy",
        "source": "toy",
        "synthetic": None,
        "modalities": ("text", "image"),
        "users": 1,
        "items": 3,
        "interactions": 5,
        "max_seq_len": 10,
        "image_size": 2,
        "skipped": {},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"histories": [np.array([0, 1, 2, 4, 3], np.int32)]},
        {"titles": ["other", *(f"title {n}" for n in range(1, 8))]},
        {"titles": None},
        {"pictures": [Shade(9), *(Shade(n) for n in range(1, 8))]},
        {"pictures": None},
        {"items": ["other", *(f"i{n}" for n in range(1, 8))]},
        {"users": ["other"]},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_the_fingerprint_covers_the_content(change: dict[str, object], tmp_path: Path) -> None:
    raw = make_raw([[0, 1, 2, 3, 4]])
    one = prepare(raw, tmp_path / "one", image_size=2)
    again = prepare(replace(raw, name="renamed", source="elsewhere"), tmp_path / "again", image_size=2)
    other = prepare(replace(raw, **change), tmp_path / "other", image_size=2)  # type: ignore[arg-type]
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 64


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_the_fingerprint_is_that_of_the_files(destination: Path, workers: int, skip_bad: bool) -> None:
    """Images are hashed while they are decoded: whoever decodes them, and in whatever order, it is one number."""
    raw = make_raw([list(range(200))], 200)
    found = prepare(raw, destination, max_seq_len=197, image_size=2, workers=workers, skip_bad=skip_bad)
    digest = hashlib.sha256(json.dumps({"format": FORMAT_VERSION, "max_seq_len": 197}).encode())
    for name in ("items.txt", "titles.bin", "users.txt"):
        blob = (destination / name).read_bytes()
        digest.update(f"\n{name} {len(blob)}\n".encode() + blob)
    for name in ("images", "offsets", "sequences", "title_offsets"):
        array = np.load(destination / f"{name}.npy")
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    assert found.fingerprint == digest.hexdigest()


def test_too_few_interactions_to_split_are_refused(destination: Path) -> None:
    with pytest.raises(UserError, match="min_interactions is 2"):
        prepare(make_raw([[0, 1]]), destination, min_interactions=2, image_size=2)


def test_images_need_a_size(destination: Path) -> None:
    with pytest.raises(UserError, match="size"):
        prepare(make_raw([[0, 1, 2, 3, 4]]), destination)


# --- images ------------------------------------------------------------------------------------------------


def test_a_pool_of_workers_writes_the_same(tmp_path: Path) -> None:
    raw = make_raw([list(range(200))], 200)
    manifests = [
        prepare(raw, tmp_path / str(workers), max_seq_len=197, image_size=3, workers=workers) for workers in (1, 3)
    ]
    assert manifests[0] == manifests[1]
    assert Dataset.open(tmp_path / "3").gather_images(np.arange(201))[1:, 0, 0, 0].tolist() == list(range(200))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_stops_and_leaves_nothing(destination: Path, workers: int) -> None:
    raw = make_raw([list(range(200))], 200, bad=(150,))
    with pytest.raises(UserError, match=r"150\.jpg: unreadable image \(truncated\).*--skip-bad"):
        prepare(raw, destination, max_seq_len=197, image_size=2, workers=workers)
    assert list(destination.parent.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_left_out(destination: Path, workers: int) -> None:
    raw = make_raw([list(range(200))], 200, bad=(0, 77, 150, 199))
    prepare(raw, destination, max_seq_len=197, image_size=2, workers=workers, skip_bad=True)
    dataset = Dataset.open(destination)
    good = [n for n in range(200) if n not in (0, 77, 150, 199)]
    assert dataset.item_names[1:] == [f"i{n}" for n in good]
    assert dataset.images is not None
    assert dataset.images[1:, 0, 0, 0].tolist() == good
    assert dataset.images[0].max() == 0
    assert dataset.manifest.skipped == {"unreadable image": 4, "interaction with a skipped item": 4}


def test_an_unused_bad_image_is_nobodys_concern(destination: Path) -> None:
    dataset = prepared(make_raw([[0, 1, 2, 3, 4]], bad=(7,)), destination)
    assert dataset.manifest.skipped == {}


def test_older_items_move_up_where_a_bad_one_is_left_out(destination: Path) -> None:
    # max_seq_len 2 keeps five items: 1 2 3 4 5 in general, but 0 1 2 3 5 without item 4
    raw = make_raw([[0, 1, 2, 3, 4, 5]], bad=(4,))
    prepare(raw, destination, max_seq_len=2, image_size=2, skip_bad=True)
    dataset = Dataset.open(destination)
    assert names(dataset) == {"u0": ["i0", "i1", "i2", "i3", "i5"]}
    assert dataset.images is not None
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 0, 1, 2, 3, 5]


def test_users_that_become_too_short_are_dropped_and_their_items_too(destination: Path) -> None:
    dataset = prepared(make_raw([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 3]], bad=(0,)), destination, skip_bad=True)
    assert names(dataset) == {"u1": ["i3", "i4", "i5", "i6", "i7", "i3"]}


def test_skip_bad_changes_nothing_where_all_is_well(tmp_path: Path) -> None:
    raw = make_raw([[7, 0, 1, 2, 3, 4]])
    strict = prepare(raw, tmp_path / "strict", max_seq_len=2, image_size=2)
    lenient = prepare(raw, tmp_path / "lenient", max_seq_len=2, image_size=2, skip_bad=True)
    assert strict == lenient


def test_nothing_is_left_of_what_it_worked_with(destination: Path) -> None:
    prepared(make_raw([[7, 0, 1, 2, 3, 4]], bad=(7,)), destination, skip_bad=True)
    assert not (destination / "decoded.npy").exists()
    assert list(destination.parent.iterdir()) == [destination]


def test_a_full_disk_is_noticed_beforehand(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(UserError, match="the images need"):
        prepared(make_raw([[0, 1, 2, 3, 4]]), destination)
    assert list(destination.parent.iterdir()) == []


def test_a_disk_that_is_full_for_a_second_copy_is_noticed_beforehand(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an image is bad, the good ones are copied: nine, of twelve bytes each, and padding."""
    free = iter([132, 119])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with pytest.raises(UserError, match="the images need"):
        prepared(make_raw([list(range(10))], 10, bad=(4,)), destination, skip_bad=True)
    assert list(destination.parent.iterdir()) == []


@dataclass(frozen=True)
class Deadly:
    """A picture that takes its worker with it, as a crash of the decoder or lack of memory would."""

    def __call__(self, size: int) -> NDArray[np.uint8]:
        os._exit(9)


def test_a_dying_worker_is_one_line(destination: Path) -> None:
    raw = replace(make_raw([list(range(200))], 200), pictures=[Deadly()] * 200)
    with pytest.raises(UserError, match="a process that decodes images died"):
        prepare(raw, destination, max_seq_len=197, image_size=2, workers=2)
    assert list(destination.parent.iterdir()) == []


# --- the destination ---------------------------------------------------------------------------------------

ONE = make_raw([[0, 1, 2, 3, 4]])
OTHER = make_raw([[0, 1, 2, 3, 5]])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_content_may_be_prepared_again(destination: Path) -> None:
    first = prepare(ONE, destination, image_size=2)
    before = (destination / "images.npy").stat()
    assert prepare(ONE, destination, image_size=2) == first
    assert (destination / "images.npy").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("other", [OTHER, make_raw([[0, 1, 2, 3, 4, 5]]), replace(ONE, titles=None)])
def test_other_content_is_refused_and_force_replaces_it(destination: Path, other: RawData) -> None:
    prepare(ONE, destination, image_size=2)
    before = content(destination)
    with pytest.raises(UserError, match="--force"):
        prepare(other, destination, image_size=2)
    assert content(destination) == before
    forced = prepare(other, destination, image_size=2, force=True)
    assert Dataset.open(destination).manifest == forced
    assert list(destination.parent.iterdir()) == [destination]


def test_other_content_is_refused_before_images_are_decoded(destination: Path) -> None:
    prepare(ONE, destination, image_size=2)
    unreadable = make_raw([[0, 1, 2, 3, 4, 5]], bad=(0,))
    with pytest.raises(UserError, match="--force"):
        prepare(unreadable, destination, image_size=2)


def test_a_damaged_dataset_is_no_equal_one(destination: Path) -> None:
    prepare(ONE, destination, image_size=2)
    (destination / "titles.bin").write_bytes(b"")
    with pytest.raises(UserError, match="damaged one"):
        prepare(ONE, destination, image_size=2)
    prepare(ONE, destination, image_size=2, force=True)
    Dataset.open(destination)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_dataset_is_never_replaced(destination: Path, force: bool) -> None:
    destination.mkdir(parents=True)
    (destination / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a prepared data set"):
        prepare(ONE, destination, image_size=2, force=force)
    assert content(destination) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ("thesis.tex", "thesis.tex"),
        ("images", "images"),
        ("link", "link"),
        ("of another program", "dataset.json that"),
        ("cut", "dataset.json that"),
    ],
)
def test_force_replaces_only_what_prepare_wrote(destination: Path, extra: str, why: str) -> None:
    if extra == "of another program":
        destination.mkdir(parents=True)
        (destination / "dataset.json").write_text('{"of": "another program"}')
        (destination / "users.txt").write_text("years of work")
    else:
        prepare(ONE, destination, image_size=2)
        if extra == "images":
            (destination / extra).mkdir()
        elif extra == "link":
            (destination / extra).symlink_to("items.txt")
        elif extra == "cut":
            (destination / "dataset.json").write_text('{"format_version": 1')
        else:
            (destination / extra).write_text("years of work")
    before = sorted(path.name for path in destination.iterdir())
    with pytest.raises(UserError, match=f"not replaced: it holds .*{why}"):
        prepare(OTHER, destination, image_size=2, force=True)
    assert sorted(path.name for path in destination.iterdir()) == before


def test_a_link_in_place_of_the_workspace_is_not_followed(destination: Path) -> None:
    (destination.parent / "mine").mkdir(parents=True)
    (destination.parent / "mine" / "thesis.tex").write_text("years of work")
    (destination.parent / f".{destination.name}.preparing").symlink_to("mine")
    with pytest.raises(UserError, match="is a link"):
        prepare(ONE, destination, image_size=2)
    assert (destination.parent / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_file_at_the_destination_is_never_replaced(destination: Path) -> None:
    destination.parent.mkdir()
    destination.write_text("a file")
    with pytest.raises(UserError, match="is not a prepared data set"):
        prepare(ONE, destination, image_size=2, force=True)
    assert destination.read_text() == "a file"


def test_an_empty_folder_at_the_destination_is_filled(destination: Path) -> None:
    destination.mkdir(parents=True)
    prepare(ONE, destination, image_size=2)
    Dataset.open(destination)


def test_a_file_among_the_parents_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(ONE, tmp_path / "file" / "data", image_size=2)


def test_something_that_appears_meanwhile_is_kept(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: object) -> tuple[str]:
        (destination / "mine").mkdir(parents=True, exist_ok=True)
        return ("text",)

    monkeypatch.setattr("tpme.bench.task.prepare._modalities", late)
    with pytest.raises(UserError, match="is not a prepared data set"):
        prepare(replace(ONE, pictures=None), destination)
    assert list(destination.parent.iterdir()) == [destination]
    assert [path.name for path in destination.iterdir()] == ["mine"]


class Second:
    """A preparation of ``raw`` in a thread, and what it says."""

    def __init__(self, raw: RawData, destination: Path) -> None:
        self._screen = io.StringIO()
        progress = Progress(console=Console(file=self._screen, width=20), disable=True)
        self._pool = ThreadPoolExecutor(1)
        self.result = self._pool.submit(prepare, raw, destination, image_size=2, progress=progress)

    def wait_until_it_waits(self) -> None:
        wait_until(lambda: self.said.endswith("another process is preparing it; waiting for it to end\n"))
        assert not self.result.done()

    @property
    def said(self) -> str:
        return self._screen.getvalue()


@pytest.mark.parametrize("other", [False, True], ids=["the same", "another"])
def test_a_second_preparation_waits_for_the_first(tmp_path: Path, destination: Path, other: bool) -> None:
    first = prepare(ONE, tmp_path / "elsewhere", image_size=2)
    with workspace.workspace(destination) as space:
        second = Second(OTHER if other else ONE, destination)
        second.wait_until_it_waits()
        shutil.copytree(tmp_path / "elsewhere", space / "dataset")
        workspace.publish(space / "dataset", destination, replace=False)
    if other:
        with pytest.raises(UserError, match="holds another data set"):
            second.result.result(timeout=60)
    else:
        assert second.result.result(timeout=60) == first
    assert second.said == f"{destination}: another process is preparing it; waiting for it to end\n"
    assert list(destination.parent.iterdir()) == [destination]
    assert Dataset.open(destination).manifest == first


def test_a_second_preparation_does_the_work_where_the_first_gave_up(destination: Path) -> None:
    with workspace.workspace(destination):
        second = Second(ONE, destination)
        second.wait_until_it_waits()
    manifest = second.result.result(timeout=60)
    assert Dataset.open(destination).manifest == manifest
    assert list(destination.parent.iterdir()) == [destination]


# --- interruption ------------------------------------------------------------------------------------------


class Interrupting(Progress):
    """Stands for a Ctrl-C in the middle of the images."""

    def advance(self, task_id: object, advance: float = 1) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_run_leaves_things_as_they_were(destination: Path, workers: int, force: bool) -> None:
    raw = make_raw([list(range(200))], 200)
    if force:
        prepare(ONE, destination, image_size=2)
    with pytest.raises(KeyboardInterrupt):
        prepare(
            raw,
            destination,
            max_seq_len=197,
            image_size=2,
            workers=workers,
            force=force,
            progress=Interrupting(disable=True),
        )
    assert list(destination.parent.iterdir()) == ([destination] if force else [])
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    prepare(raw, destination, max_seq_len=197, image_size=2, force=force)
    assert Dataset.open(destination).manifest.items == 200


def test_leftovers_of_a_killed_run_are_cleared(destination: Path) -> None:
    stale = destination.parent / ".data.preparing"
    (stale / "dataset").mkdir(parents=True)
    (stale / "dataset" / "images.npy").write_bytes(b"half")
    (stale / "lock").write_bytes(b"")
    prepare(ONE, destination, image_size=2)
    assert list(destination.parent.iterdir()) == [destination]


def test_a_lock_that_is_held_protects_its_folder(destination: Path) -> None:
    folder = destination.parent / ".data.preparing"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "half").write_text("")
        second = Second(ONE, destination)
        second.wait_until_it_waits()
        assert (folder / "half").exists()
    second.result.result(timeout=60)
    assert list(destination.parent.iterdir()) == [destination]


def test_killed_between_the_two_renames_of_a_replacement(destination: Path) -> None:
    first = prepare(ONE, destination, image_size=2)
    stale = destination.parent / ".data.preparing"
    stale.mkdir()
    destination.rename(stale / "previous")
    with pytest.raises(UserError, match="cannot be read"):
        prepare(replace(ONE, pictures=[Unreadable()] * 8), destination, image_size=2)
    assert Dataset.open(destination).manifest == first


class Unreadable:
    def __call__(self, size: int) -> NDArray[np.uint8]:
        raise UserError("cannot be read")


SLOW = """
    import os, time
    import numpy as np
    from pathlib import Path
    from tpme.bench.task.sources.raw import RawData
    from tpme.bench.task.sources import iisan

    class Slow:
        def __call__(self, size):
            Path(f"worker-{os.getpid()}").touch()
            time.sleep(0.05)
            return np.zeros((3, size, size), np.uint8)

    def read(folder, **options):
        n = 2000
        items = [str(i) for i in range(n)]
        return RawData("slow", items, None, [Slow()] * n, ["u"], [np.arange(n, dtype=np.int32)], {})

    if __name__ == "__main__":
        iisan.read_iisan = read
        from tpme.bench import cli
        cli.main()
"""


@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_outlives_the_command(tmp_path: Path, end: signal.Signals, code: int) -> None:
    program = tmp_path / "slow.py"
    program.write_text(textwrap.dedent(SLOW))
    place = tmp_path / "place"
    arguments = [
        "prepare",
        "iisan",
        "any",
        place / "data",
        "--max-seq-len",
        "1997",
        "--workers",
        "2",
        "--image-size",
        "8",
    ]
    running = subprocess.Popen(
        [sys.executable, program, *map(str, arguments)],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    command = psutil.Process(running.pid)
    # At work, not just started: a process whose parent is killed before it could say what to do ends with a traceback.
    wait_until(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
    children = command.children(recursive=True)
    assert len(children) >= 3  # two workers and multiprocessing's resource tracker
    assert (place / ".data.preparing" / "dataset" / "images.npy").exists()
    if end == signal.SIGINT:
        os.killpg(running.pid, end)  # as a terminal does: to all of them
    else:
        running.kill()
    output, _ = running.communicate(timeout=60)
    assert running.returncode == code, output
    assert "Traceback" not in output
    wait_until(lambda: not any(alive(child) for child in children))
    assert not (place / "data").exists()
    if end == signal.SIGINT:
        assert list(place.iterdir()) == []


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited a minute in vain")


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_prints_what_came_out(
    destination: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "synthetic", str(destination), "--users", "50", "--items", "60", "--image-size", "8"]
    monkeypatch.setattr("sys.argv", ["tpme", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    manifest = Manifest.model_validate(json.loads((destination / "dataset.json").read_text()))
    printed = {line.strip("│ ") for line in capsys.readouterr().out.splitlines()}
    assert any(line.startswith("users") and line.endswith("50") for line in printed)
    assert any(line.startswith("items ") and line.endswith(str(manifest.items)) for line in printed)
    assert any(line.startswith("cold test targets") and line.endswith("%") for line in printed)
    assert any(line.startswith("fingerprint") and line.endswith(manifest.fingerprint[:12]) for line in printed)


@pytest.mark.parametrize(("chosen", "files"), [("text", {"titles.bin"}), ("image", {"images.npy"})])
def test_the_built_in_catalogue_with_one_modality(
    destination: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, files: set[str]
) -> None:
    arguments = ["prepare", "synthetic", str(destination), "--users", "50", "--items", "60", "--modalities", chosen]
    monkeypatch.setattr("sys.argv", ["tpme", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert Dataset.open(destination).manifest.modalities == (chosen,)
    assert {path.name for path in destination.iterdir()} & {"titles.bin", "images.npy"} == files


def test_preparing_needs_no_torch(destination: Path) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['tpme', 'prepare', 'synthetic', {str(destination)!r}, '--users', '50', '--image-size', '8']\n"
        "from tpme.bench.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False"
