"""Pictures, archives and tables that are broken or hostile: one line, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.family_images import ARCHIVES, IMAGES, WHOLE, member, with_fields
from PIL import Image

from tpme.bench.errors import UserError
from tpme.bench.task.sources.iisan import read_iisan
from tpme.bench.task.sources.pictures import FilePicture, find_pictures
from tpme.bench.task.sources.reading import InputErrors
from tpme.bench.task.sources.table_files import TableFile


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "images.zip"
    path.write_bytes(ARCHIVES[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"images\.zip") as error:
        find_pictures(path, InputErrors(skip_bad=False))["a"](8)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"PK\x05\x06" + b"\xff" * 18, bytes(1000)])
def test_what_is_no_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.zip"
    path.write_bytes(content)
    message = f"{path}: "
    try:
        assert find_pictures(path, InputErrors(skip_bad=False)) == {}
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_a_name_in_an_archive_that_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    path.write_bytes(with_fields(member(WHOLE).replace(b"a.png", b"\xff\xfe\xff.g"), flags=0x800))
    with pytest.raises(UserError, match=r"images\.zip: neither a folder nor a readable zip archive"):
        find_pictures(path, InputErrors(skip_bad=False))


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(IMAGES[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "too many rows":  # what is beyond the picture is not unpacked
        FilePicture(path)(8)
    else:
        with pytest.raises(UserError, match=r"a\.png: unreadable image") as error:
            FilePicture(path)(8)
        assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


def test_a_large_photo_is_still_read(tmp_path: Path) -> None:
    Image.new("RGB", (8000, 6000), (10, 20, 30)).save(tmp_path / "a.jpg")
    assert FilePicture(tmp_path / "a.jpg")(4)[:, 0, 0].tolist() == pytest.approx([10, 20, 30], abs=2)


def test_a_file_too_large_for_a_picture_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.write(WHOLE)
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"a\.png: unreadable image \(larger than 64 MiB"):
        FilePicture(tmp_path / "a.png")(8)


# --- what is no file ------------------------------------------------------------------------------------------------


def source(folder: Path) -> Path:
    """A small data set in the release format with images."""
    (folder / "images").mkdir(parents=True)
    names = [f"i{n}" for n in range(6)]
    (folder / "items.tsv").write_text("".join(f"{name}\ttitle\n" for name in names))
    (folder / "users.tsv").write_text(f"u\t{' '.join(names)}\n")
    for name in names:
        (folder / "images" / f"{name}.png").write_bytes(WHOLE)
    return folder


@pytest.mark.parametrize("name", ["items.tsv", "users.tsv", "images/i3.png"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    folder = source(tmp_path / "toy")
    (folder / name).unlink()
    {"fifo": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](folder / name)
    command = [sys.executable, "-m", "tpme.bench.cli", "prepare", "iisan", str(folder), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert Path(name).name in last or "i3" in last
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """Of the source, of pictures that belong to no item, and of the destination."""
    folder = source(Path(os.fsdecode(bytes(tmp_path) + b"/toy\xff")))
    Path(os.fsdecode(bytes(folder) + b"/images/\xfe.png")).write_bytes(WHOLE)
    assert read_iisan(folder).name == r"toy\udcff"
    out = os.fsdecode(bytes(tmp_path) + b"/out\xff")
    command = [sys.executable, "-m", "tpme.bench.cli", "prepare", "iisan", str(folder), out, "--image-size", "4"]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert rb"out\udcff is ready" in ended.stdout
    again = subprocess.run([*command[:-2], "--image-size", "8"], capture_output=True, timeout=60, check=False)
    assert again.returncode == 2
    assert rb"out\udcff: holds another data set" in again.stderr


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "toy")
    with (folder / "items.tsv").open("ab") as file:
        file.truncate(2**31)
    with pytest.raises(UserError, match=r"items\.tsv, line 7: longer than 16 MiB"):
        read_iisan(folder)


TABLES: dict[str, tuple[str, bytes]] = {
    "JSON nested 10^5 deep": ("a.jsonl", b'{"user": ' + b"[" * 10**5),
    "JSON that is a list": ("a.jsonl", b"[1]\n"),
    "no Parquet": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    "Parquet of nothing": ("a.parquet", b""),
    "Parquet with a footer of 2 GB": ("a.parquet", b"PAR1" + bytes(100) + struct.pack("<I", 2**31 - 1) + b"PAR1"),
    "a field of 10^6 characters": ("a.csv", b"user\n" + b"x" * 10**6),
    "an open quote": ("a.csv", b'user\n"abc\n'),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_is_one_line(tmp_path: Path, name: str) -> None:
    file, content = TABLES[name]
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=file) as error:
        list(TableFile(tmp_path / file, "interactions").rows({"user": "user"}, InputErrors(skip_bad=False)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_parquet_with_broken_pages_is_one_line(tmp_path: Path, place: float) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    users = [f"user number {n * 7919 % 10007}" for n in range(10_000)]
    parquet.write_table(arrow.table({"user": users}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = int(place * len(data))
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    rows = TableFile(path, "interactions").rows({"user": "user"}, InputErrors(skip_bad=False))
    message = f"{path}: "
    try:
        assert len(list(rows)) == len(users)
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
