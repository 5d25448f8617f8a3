"""The release format: what is read, and that every broken input gets one line that names the place."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tpme.bench import cli
from tpme.bench.errors import UserError
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.sources.iisan import read_iisan

ITEMS = "".join(f"i{n}\tTitle {n}\n" for n in range(1, 9))
USERS = "ann\ti1 i2 i3 i4 i5\nbob\ti5 i6 i7 i8 i1 i2\ncyd\ti1 i2\n"
SUFFIXES = ("jpg", "JPG", "jpeg", "png", "PNG", "webp", "WebP", "jpg")


def encoded(shade: int, suffix: str = "jpg", size: tuple[int, int] = (60, 40)) -> bytes:
    """An image file of one shade, with noise so that cutting it short loses something."""
    noise = np.random.default_rng(shade).integers(0, 20, (size[1], size[0], 3))
    picture = Image.fromarray((shade + noise).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix.lower()])
    return buffer.getvalue()


IMAGES = {f"i{n}.{suffix}": encoded(20 * n, suffix) for n, suffix in enumerate(SUFFIXES, start=1)}


@dataclass
class Release:
    """A small data set in the release format, to be spoilt before it is written."""

    items: str | bytes | None = ITEMS
    users: str | bytes | None = USERS
    images: dict[str, bytes] | None = None
    archive: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in (("items.tsv", self.items), ("users.tsv", self.users)):
            if content is not None:
                (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for name, data in (self.images or {}).items():
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "images" / name).write_bytes(data)
        if self.archive:
            with zipfile.ZipFile(folder / "images.zip", "w") as archive:
                for name, data in self.archive.items():
                    archive.writestr(name, data)
        return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run ``tpme`` in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["tpme", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


# --- what is read ------------------------------------------------------------------------------------------


def test_items_users_and_histories(tmp_path: Path) -> None:
    raw = read_iisan(Release().write(tmp_path / "toy"))
    assert raw.name == "toy"
    assert raw.items == [f"i{n}" for n in range(1, 9)]
    assert raw.titles == [f"Title {n}" for n in range(1, 9)]
    assert raw.pictures is None
    assert raw.users == ["ann", "bob", "cyd"]
    assert [history.tolist() for history in raw.histories] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 0, 1], [0, 1]]
    assert raw.skipped == {}


def test_line_ends_byte_order_mark_and_empty_lines(tmp_path: Path) -> None:
    items = b"\xef\xbb\xbf" + ITEMS.replace("\n", "\r\n").encode() + b"\r\n\n"
    raw = read_iisan(Release(items, USERS.rstrip("\n")).write(tmp_path / "toy"))
    assert raw.items[0] == "i1"
    assert raw.titles is not None
    assert raw.titles[0] == "Title 1"
    assert len(raw.users) == 3


def test_characters_that_look_like_line_ends_stay_in_the_title(tmp_path: Path) -> None:
    raw = read_iisan(Release(ITEMS.replace("Title 2", "a\u2028b\x0bc\x85d &amp; Größe")).write(tmp_path / "toy"))
    assert raw.titles is not None
    assert raw.titles[1] == "a\u2028b\x0bc\x85d &amp; Größe"


def test_images_in_a_folder_with_any_suffix(tmp_path: Path) -> None:
    images = IMAGES | {"unused.jpg": b"", "notes.txt": b"", ".hidden/i1.jpg": b""}
    raw = read_iisan(Release(images=images).write(tmp_path / "toy"))
    assert raw.pictures is not None
    for n, picture in enumerate(raw.pictures, start=1):
        array = picture(16)
        assert array.shape == (3, 16, 16)
        assert array.dtype == np.uint8
        assert abs(array.mean() - (20 * n + 9.5)) < 5


def test_a_zip_archive_reads_like_its_folder(tmp_path: Path) -> None:
    folder = read_iisan(Release(images=IMAGES).write(tmp_path / "folder"))
    archive = {f"top/{name}": data for name, data in IMAGES.items()} | {"__MACOSX/._i1.jpg": b"", "top/._i2.jpg": b""}
    zipped = read_iisan(Release(archive=archive).write(tmp_path / "zipped"))
    assert folder.pictures is not None
    assert zipped.pictures is not None
    for unzipped, other in zip(folder.pictures, zipped.pictures, strict=True):
        np.testing.assert_array_equal(unzipped(16), other(16))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    buffer = io.BytesIO()
    suffix = "JPEG" if mode == "CMYK" else "PNG"
    Image.new("RGB", (30, 30), (90, 90, 90)).convert(mode).save(buffer, suffix)
    images = {name: data for name, data in IMAGES.items() if not name.startswith("i1.")}
    raw = read_iisan(Release(images=images | {"i1.png": buffer.getvalue()}).write(tmp_path / "toy"))
    assert raw.pictures is not None
    array = raw.pictures[0](8)
    assert array.shape == (3, 8, 8)
    assert np.all(np.abs(array.astype(int) - 90) <= 3)


def test_resizing_is_the_bilinear_one_of_the_image_processor(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    raw = read_iisan(Release(images=IMAGES | {"i4.png": buffer.getvalue()}).write(tmp_path / "toy"))
    assert raw.pictures is not None
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(raw.pictures[3](16), expected)


def test_a_large_photo_decoded_small_looks_the_same(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    raw = read_iisan(Release(images=IMAGES | {"i1.jpg": buffer.getvalue()}).write(tmp_path / "toy"))
    assert raw.pictures is not None
    with Image.open(buffer) as whole:
        expected = np.asarray(whole.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    error = np.abs(raw.pictures[0](32).astype(int) - expected).mean()
    assert error < 2


def test_without_text_the_title_column_may_be_missing(tmp_path: Path) -> None:
    items = "".join(f"i{n}\n" for n in range(1, 8)) + "i8\t\n"
    raw = read_iisan(Release(items, images=IMAGES).write(tmp_path / "toy"), modalities=("image",))
    assert raw.titles is None
    assert raw.pictures is not None
    assert len(raw.pictures) == 8


def test_images_can_be_left_out(tmp_path: Path) -> None:
    assert read_iisan(Release(images=IMAGES).write(tmp_path / "toy"), modalities=("text",)).pictures is None


# --- broken input ------------------------------------------------------------------------------------------

WITHOUT_I3 = {name: data for name, data in IMAGES.items() if not name.startswith("i3.")}


@dataclass(frozen=True)
class Broken:
    """One way to be broken: the release, what the message must say, and the reason counted by --skip-bad."""

    release: Release
    message: str
    reason: str | None
    users: tuple[str, ...] = ("ann", "bob")
    """Who is left with --skip-bad; empty where it cannot help."""


def with_image(name: str, data: bytes) -> dict[str, bytes]:
    stem = name.split(".")[0]
    return {key: value for key, value in IMAGES.items() if key.split(".")[0] != stem} | {name: data}


BROKEN = {
    "missing items file": Broken(Release(items=None), r"items\.tsv: cannot be read \(No such file", None),
    "missing users file": Broken(Release(users=None), r"users\.tsv: cannot be read \(No such file", None),
    "unknown item": Broken(
        Release(users=USERS.replace("i8", "x")), r"users\.tsv, line 2: item 'x' is not among", "unknown item"
    ),
    "empty title": Broken(
        Release(ITEMS.replace("Title 8", "  ")), r"items\.tsv, line 8: item 'i8' has an empty title", "empty title"
    ),
    "empty title of a user's fifth item": Broken(
        Release(ITEMS.replace("Title 3", "")), r"items\.tsv, line 3: .*empty title", "empty title", users=("bob",)
    ),
    "duplicate item": Broken(
        Release(ITEMS + "i2\tagain\n"), r"items\.tsv, line 9: item 'i2' occurs twice", "duplicate item"
    ),
    "duplicate user": Broken(
        Release(users=USERS + "ann\ti1 i2\n"), r"users\.tsv, line 4: user 'ann' occurs twice", "duplicate user"
    ),
    "one column of items": Broken(
        Release(ITEMS + "i9\n"), r"items\.tsv, line 9: 1 columns; expected item TAB title", "wrong column count"
    ),
    "three columns of items": Broken(
        Release(ITEMS + "i9\ta\tb\n"), r"items\.tsv, line 9: 3 columns; expected", "wrong column count"
    ),
    "one column of users": Broken(
        Release(users="ann i1\n" + USERS), r"users\.tsv, line 1: 1 columns; expected user TAB", "wrong column count"
    ),
    "items not UTF-8": Broken(
        Release(ITEMS.encode() + b"i9\tGr\xf6\xdfe\n"), r"items\.tsv, line 9: not UTF-8 \(byte 0xf6", "not UTF-8"
    ),
    "users not UTF-8": Broken(
        Release(users=b"\xff\ti1\n" + USERS.encode()), r"users\.tsv, line 1: not UTF-8 \(byte 0xff", "not UTF-8"
    ),
    "empty item id": Broken(Release(ITEMS + "\tno id\n"), r"items\.tsv, line 9: empty item id", "empty item id"),
    "empty user id": Broken(Release(users=USERS + " \ti1\n"), r"users\.tsv, line 4: empty user id", "empty user id"),
    "missing image": Broken(
        Release(images=WITHOUT_I3),
        r"items\.tsv, line 3: item 'i3' has no image in .*images",
        "missing image",
        users=("bob",),
    ),
    "unreadable image": Broken(
        Release(images=with_image("i8.jpg", b"not an image")),
        r"i8\.jpg: unreadable image \(not JPEG, PNG or WebP\)",
        "unreadable image",
    ),
    "empty image": Broken(Release(images=with_image("i8.png", b"")), r"i8\.png: unreadable image", "unreadable image"),
    "truncated image": Broken(
        Release(images=with_image("i7.jpg", encoded(9)[:-200])),
        r"i7\.jpg: unreadable image \(.*(?i:truncated)",
        "unreadable image",
    ),
    "duplicate image": Broken(
        Release(images=IMAGES | {"sub/i2.png": encoded(9)}), r"images: .*i2.* both belong to", "duplicate image"
    ),
    "unreadable image in a zip": Broken(
        Release(archive=with_image("i8.jpg", b"not an image")),
        r"images\.zip, entry 'i8\.jpg': unreadable image",
        "unreadable image",
    ),
    "zip entry above its folder": Broken(
        Release(archive=IMAGES | {"../evil.jpg": encoded(1)}),
        r"images\.zip: entry '\.\./evil\.jpg' points outside",
        "unsafe zip entry",
    ),
    "zip entry at the root": Broken(
        Release(archive=IMAGES | {"/etc/evil.jpg": encoded(1)}), r"entry '/etc/evil\.jpg' points", "unsafe zip entry"
    ),
    "zip entry with backslashes": Broken(
        Release(archive=IMAGES | {"a\\..\\..\\evil.jpg": encoded(1)}), r"evil\.jpg' points outside", "unsafe zip entry"
    ),
    "zip entry on a drive": Broken(
        Release(archive=IMAGES | {"C:evil.jpg": encoded(1)}), r"'C:evil\.jpg' points outside", "unsafe zip entry"
    ),
    "no user left": Broken(Release(users="ann\ti1\n"), r"no user has at least 5 items \(maximum 1", None),
    "no users at all": Broken(Release(users=""), r"no user has at least 5 items", None),
    "no items at all": Broken(Release(items="", users=""), r"no user has at least 5 items", None),
}


def prepare_arguments(case: Broken, tmp_path: Path) -> list[str | Path]:
    source = case.release.write(tmp_path / "toy")
    return ["prepare", "iisan", source, tmp_path / "out" / "data", "--image-size", "8"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_gets_one_line_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *prepare_arguments(BROKEN[name], tmp_path)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tpme: ")]
    assert len(errors) == 1
    assert re.search(BROKEN[name].message, errors[0]), errors[0]
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", BROKEN)
def test_skip_bad_goes_on_and_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = BROKEN[name]
    code = run(monkeypatch, *prepare_arguments(case, tmp_path), "--skip-bad")
    if case.reason is None:
        assert code == 2
        return
    assert code == 0
    dataset = Dataset.open(tmp_path / "out" / "data")
    skipped = dataset.manifest.skipped
    assert {reason for reason in skipped if reason != "interaction with a skipped item"} == {case.reason}
    assert skipped[case.reason] == 1
    assert tuple(dataset.user_names) == case.users
    assert f"skipped: {case.reason}" in capsys.readouterr().out


def test_skip_bad_counts_interactions_with_what_was_skipped(tmp_path: Path) -> None:
    raw = read_iisan(Release(ITEMS.replace("Title 2", "")).write(tmp_path / "toy"), skip_bad=True)
    assert raw.skipped == {"empty title": 1, "interaction with a skipped item": 3}
    assert "i2" not in raw.items
    assert [len(history) for history in raw.histories] == [4, 5, 1]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_images_cut_short_anywhere_are_noticed(tmp_path: Path, suffix: str, share: float) -> None:
    data = encoded(50, suffix, size=(300, 300))
    release = Release(images=with_image(f"i1.{suffix}", data[: int(share * len(data))]))
    raw = read_iisan(release.write(tmp_path / "toy"))
    assert raw.pictures is not None
    with pytest.raises(UserError, match=rf"i1\.{suffix}: unreadable image") as error:
        raw.pictures[0](8)
    assert "\n" not in str(error.value)


def test_a_damaged_zip_entry_is_noticed(tmp_path: Path) -> None:
    source = Release(archive=IMAGES).write(tmp_path / "toy")
    archive = (source / "images.zip").read_bytes()
    at = archive.index(IMAGES["i1.jpg"]) + 300
    (source / "images.zip").write_bytes(archive[:at] + bytes([archive[at] ^ 255]) + archive[at + 1 :])
    raw = read_iisan(source)
    assert raw.pictures is not None
    with pytest.raises(UserError, match=r"entry 'i1\.jpg': unreadable image \(Bad CRC"):
        raw.pictures[0](8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder / "nowhere", "nowhere: no such folder"),
        (lambda folder: folder / "items.tsv", "items.tsv: no such folder"),
    ],
)
def test_a_missing_source_is_named(tmp_path: Path, spoil: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_iisan(spoil(Release().write(tmp_path / "toy")))


@pytest.mark.parametrize(
    ("images", "message"), [("nowhere", "no such image folder"), ("items.tsv", "neither a folder nor a readable zip")]
)
def test_a_wrong_images_option_is_named(tmp_path: Path, images: str, message: str) -> None:
    source = Release().write(tmp_path / "toy")
    with pytest.raises(UserError, match=message):
        read_iisan(source, images=source / images)


def test_asking_for_images_where_none_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass their location with --images"):
        read_iisan(Release().write(tmp_path / "toy"), modalities=("image",))


def test_an_unknown_modality_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Release().write(tmp_path / "toy")
    assert run(monkeypatch, "prepare", "iisan", source, tmp_path / "data", "--modalities", "text,video") == 2
