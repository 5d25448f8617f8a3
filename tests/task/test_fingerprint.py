"""What changed on disk is found before use, and what did not is not read again."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.bench.task import dataset as datasets
from tpme.bench.task import fingerprint
from tpme.bench.task.dataset import FILES, Dataset, content_digest, read_manifest
from tpme.bench.task.fingerprint import is_unchanged, sha256_of
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(generate(Synthetic(users=30, items=40)), folder, image_size=4)
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose content has been read."""
    seen: list[Path] = []

    def counted(folder: Path, manifest: datasets.Manifest) -> str:
        seen.append(folder)
        return content_digest(folder, manifest)

    monkeypatch.setattr(datasets, "content_digest", counted)
    monkeypatch.setattr(fingerprint, "_TICK_NS", 0)
    return seen


def flip(path: Path) -> None:
    """Change the last byte of a file, and leave its size and time of change as they are."""
    facts, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_the_content_read_again_is_what_was_prepared(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    assert content_digest(prepared, manifest) == manifest.fingerprint


def test_content_is_read_once(copy: Path, tmp_path: Path, reads: list[Path]) -> None:
    for _ in range(3):
        Dataset.open(copy, tmp_path / "store")
    assert reads == [copy]
    os.utime(copy / "images.npy")
    Dataset.open(copy, tmp_path / "store")
    Dataset.open(copy, tmp_path / "store")
    assert reads == [copy, copy]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found_where_size_and_time_are_kept(
    copy: Path, tmp_path: Path, reads: list[Path], name: str
) -> None:
    Dataset.open(copy, tmp_path / "store")
    time.sleep(0.02)  # a tick of the file system's clock
    flip(copy / name)
    with pytest.raises(UserError, match="copy") as error:
        Dataset.open(copy, tmp_path / "store")
    assert "\n" not in str(error.value)
    assert "prepare the data set again" in str(error.value)


def test_what_changed_after_the_preparation_is_named(copy: Path, tmp_path: Path) -> None:
    later = (copy / "dataset.json").stat().st_mtime_ns + 10**9
    flip(copy / "titles.bin")
    os.utime(copy / "titles.bin", ns=(later, later))
    with pytest.raises(UserError, match=r"not what was prepared \(changed since: titles\.bin\)"):
        Dataset.open(copy, tmp_path / "store")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10_000, b'["0", {}]'])
def test_a_damaged_memory_is_no_memory(copy: Path, tmp_path: Path, reads: list[Path], content: bytes) -> None:
    Dataset.open(copy, tmp_path / "store")
    (memory,) = (tmp_path / "store" / "checked").iterdir()
    memory.write_bytes(content)
    flip(copy / "images.npy")
    with pytest.raises(UserError, match="not what was prepared"):
        Dataset.open(copy, tmp_path / "store")
    assert reads == [copy, copy]


def test_without_a_memory_everything_is_read(copy: Path, tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "store").write_text("no folder")
    for _ in range(2):
        Dataset.open(copy, tmp_path / "store")
    assert reads == [copy, copy]


def test_what_has_just_changed_is_read_again(tmp_path: Path) -> None:
    """A change within the same tick of the clock would leave no trace."""
    path, memory = tmp_path / "file", tmp_path / "memory"
    path.write_bytes(b"a")
    digest = sha256_of(path)
    assert is_unchanged([path], digest, lambda: sha256_of(path), memory)
    assert not memory.exists()
    old = time.time_ns() - 10**10
    os.utime(path, ns=(old, old))  # changes the time of the status, too
    time.sleep(1.1)
    assert is_unchanged([path], digest, lambda: sha256_of(path), memory)
    assert memory.exists()


def test_an_array_in_another_order_is_another_content(copy: Path, tmp_path: Path) -> None:
    """The same bytes, of which the header says that columns come first."""
    images = np.load(copy / "images.npy")
    swapped = images.ravel().reshape(images.shape, order="F")
    np.save(copy / "images.npy", swapped)
    with pytest.raises(UserError, match="Fortran order"):
        Dataset.open(copy, tmp_path / "store")


@pytest.mark.parametrize("name", [*FILES, "dataset.json"])
def test_a_pipe_in_place_of_a_file_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    for store in (None, tmp_path / "store"):
        with pytest.raises(UserError, match="not a regular file"):
            Dataset.open(copy, store)


@pytest.mark.slow
def test_opening_a_million_items_reads_no_content_again(tmp_path: Path) -> None:
    """Sparse images of 6 GB: 2 s a GB to read, and they are not."""
    items, users, side = 1_000_000, 200_000, 32
    folder = tmp_path / "large"
    folder.mkdir()
    np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (items + 1, 3, side, side)).flush()
    sequences = np.tile(np.arange(1, items + 1, dtype=np.int32), 1)
    np.save(folder / "sequences.npy", sequences)
    np.save(folder / "offsets.npy", np.arange(0, items + 1, items // users, dtype=np.int64))
    (folder / "items.txt").write_text("".join(f"i{n}\n" for n in range(items)))
    (folder / "users.txt").write_text("".join(f"u{n}\n" for n in range(users)))
    manifest = datasets.Manifest(
        name="large", source="large", modalities=("image",), users=users, items=items, interactions=items,
        max_seq_len=10, image_size=side, skipped={}, fingerprint="0" * 64,
    )  # fmt: skip
    digest = content_digest(folder, manifest)
    (folder / "dataset.json").write_text(manifest.model_copy(update={"fingerprint": digest}).model_dump_json())
    time.sleep(1.1)
    Dataset.open(folder, tmp_path / "store")
    started = time.monotonic()
    Dataset.open(folder, tmp_path / "store")
    with_store = time.monotonic() - started
    started = time.monotonic()
    Dataset.open(folder)
    assert with_store < time.monotonic() - started + 0.2
