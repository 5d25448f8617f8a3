"""Generic tables: order in time, chosen column names, MicroLens as published, and every kind of broken row."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tpme.bench import cli
from tpme.bench.errors import UserError
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.tables import Columns, read_tables

ITEMS = "item,title\n" + "".join(f'{n},"Title, {n}"\n' for n in range(1, 8))
INTERACTIONS = "user,item,timestamp\n" + "".join(f"{u},{(n + u) % 7 + 1},{n}\n" for u in (2, 1) for n in range(6))


def write(folder: Path, interactions: str | bytes = INTERACTIONS, items: str | bytes = ITEMS) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    paths = folder / "pairs.csv", folder / "items.csv"
    for path, content in zip(paths, (interactions, items), strict=True):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return paths


def read(folder: Path, interactions: str | bytes = INTERACTIONS, items: str | bytes = ITEMS) -> RawData:
    return read_tables(*write(folder, interactions, items))


def by_name(raw: RawData) -> dict[str, list[str]]:
    return {user: [raw.items[i] for i in history] for user, history in zip(raw.users, raw.histories, strict=True)}


def test_interactions_are_ordered_by_time_and_ties_by_the_file(tmp_path: Path) -> None:
    rows = ["b,2,7", "a,3,30", "a,2,-1", "b,1,7", "a,1,30", "b,3,6.5", "a,4,1e1"]
    raw = read(tmp_path, "user,item,timestamp\n" + "\n".join(rows))
    assert by_name(raw) == {"b": ["3", "2", "1"], "a": ["2", "4", "3", "1"]}
    assert raw.users == ["b", "a"]
    assert raw.titles is not None
    assert raw.titles[0] == "Title, 1"


def test_nanoseconds_are_not_rounded(tmp_path: Path) -> None:
    # As float64 the two would be equal, and would stay in the order of the file.
    rows = ["a,1,1583378629552000002", "a,2,1583378629552000001"]
    assert by_name(read(tmp_path, "user,item,timestamp\n" + "\n".join(rows))) == {"a": ["2", "1"]}


def test_columns_can_be_named_and_others_are_ignored(tmp_path: Path) -> None:
    interactions = "when,who,stars,what\n2,ann,5,x\n1,ann,4,y\n"
    items = "name,price,what\nThing,3,x\nOther,4,y\n"
    columns = Columns(user="who", item="what", timestamp="when", title="name")
    raw = read_tables(*write(tmp_path, interactions, items), columns=columns)
    assert by_name(raw) == {"ann": ["y", "x"]}
    assert raw.titles == ["Thing", "Other"]


def test_quoted_fields_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    raw = read(tmp_path, items='item,title\n1,"a ""b"", c\nd"\r\n2,x\r\n', interactions="user,item,timestamp\nu,2,1\n")
    assert raw.titles == ['a "b", c\nd', "x"]


@pytest.mark.parametrize("archive", [False, True])
def test_microlens_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool) -> None:
    interactions = INTERACTIONS.replace("timestamp\n", "timestamp\n3,1,1583378629552\n")
    pairs, titles = write(tmp_path, interactions)
    covers = tmp_path / "MicroLens-100k_covers"
    covers.mkdir()
    for n in range(1, 8):
        Image.new("RGB", (20, 30), (n, n, n)).save(covers / f"{n}.jpg")
    if archive:
        covers = Path(shutil.make_archive(str(covers), "zip", tmp_path, covers.name))
    options = ["--interactions", pairs, "--items", titles, "--images", covers, "--image-size", 8]
    monkeypatch.setattr("sys.argv", ["tpme", "prepare", "tables", *map(str, options), str(tmp_path / "data")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.manifest.modalities == ("text", "image")
    assert dataset.user_names == ["2", "1"]
    assert dataset.images is not None
    np.testing.assert_allclose(dataset.images[:, 0, 0, 0], np.arange(8), atol=2)


def test_without_text_no_title_is_needed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "x.png")
    paths = write(tmp_path, "user,item,timestamp\nu,x,1\n", "item\nx\n")
    raw = read_tables(*paths, images=tmp_path / "images", modalities=("image",))
    assert raw.titles is None
    assert raw.pictures is not None


# --- broken input ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """Content, what the message must say, and the reason counted when it is skipped (None: it cannot be)."""

    message: str
    reason: str | None
    interactions: str | bytes = INTERACTIONS
    items: str | bytes = ITEMS


BROKEN = {
    "empty interactions": Broken(r"pairs\.csv, line 1: no column 'user' in the header \(empty file", None, ""),
    "no header": Broken(r"pairs\.csv, line 1: no column 'user' .*--user-column", None, "1,2,3\n" + INTERACTIONS),
    "no title column": Broken(r"items\.csv, line 1: no column 'title' .*--title-column", None, items="item\n1\n"),
    "no timestamp column": Broken(
        r"pairs\.csv, line 1: no column 'timestamp' .*--time-column", None, "user,item\n1,2\n"
    ),
    "bad timestamp": Broken(
        r"pairs\.csv, line 14: timestamp 'yesterday' is not", "bad timestamp", INTERACTIONS + "1,2,yesterday\n"
    ),
    "empty timestamp": Broken(r"pairs\.csv, line 14: timestamp ''", "bad timestamp", INTERACTIONS + "1,2,\n"),
    "infinite timestamp": Broken(r"line 14: timestamp 'inf'", "bad timestamp", INTERACTIONS + "1,2,inf\n"),
    "NaN timestamp": Broken(r"line 14: timestamp 'nan'", "bad timestamp", INTERACTIONS + "1,2,nan\n"),
    "unknown item": Broken(r"pairs\.csv, line 14: item '99' is not among", "unknown item", INTERACTIONS + "1,99,3\n"),
    "empty user": Broken(r"pairs\.csv, line 14: empty user id", "empty user id", INTERACTIONS + ",2,3\n"),
    "line break in a user": Broken(
        r"pairs\.csv, line 14: line break in user id", "line break in user id", INTERACTIONS + '"a\nb",2,3\n'
    ),
    "too few columns": Broken(
        r"pairs\.csv, line 14: 2 columns; the header has 3", "wrong column count", INTERACTIONS + "1,2\n"
    ),
    "too many columns": Broken(r"items\.csv, line 9: 3 columns", "wrong column count", items=ITEMS + "8,a,b\n"),
    "open quote": Broken(r"items\.csv, line 9: not CSV", "malformed row", items=ITEMS + '8,"a\n'),
    "text after a quote": Broken(r"items\.csv, line 9: not CSV", "malformed row", items=ITEMS + '8,"a" b\n'),
    "items not UTF-8": Broken(
        r"items\.csv, line 9: not UTF-8 \(byte 0xfc at column 4\)", "not UTF-8", items=ITEMS.encode() + b"8,f\xfcnf\n"
    ),
    "interactions not UTF-8": Broken(r"pairs\.csv, line 14: not", "not UTF-8", INTERACTIONS.encode() + b"\xff,1,1\n"),
    "line after a title of two lines": Broken(
        r"items\.csv, line 11: item '8' has an empty title", "empty title", items=ITEMS + '9,"a\nb"\n8,\n'
    ),
    "duplicate item": Broken(r"items\.csv, line 9: item '3' occurs", "duplicate item", items=ITEMS + "3,again\n"),
    "empty title": Broken(r"items\.csv, line 9: item '8' has an empty title", "empty title", items=ITEMS + '8," "\n'),
    "empty item": Broken(r"items\.csv, line 9: empty item id", "empty item id", items=ITEMS + ",x\n"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_names_file_and_line(name: str, tmp_path: Path) -> None:
    case = BROKEN[name]
    with pytest.raises(UserError) as error:
        read(tmp_path, case.interactions, case.items)
    assert re.search(case.message, str(error.value)), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_skip_bad_reads_the_rest(name: str, tmp_path: Path) -> None:
    case = BROKEN[name]
    paths = write(tmp_path, case.interactions, case.items)
    if case.reason is None:
        with pytest.raises(UserError):
            read_tables(*paths, skip_bad=True)
        return
    raw = read_tables(*paths, skip_bad=True)
    assert raw.skipped == {case.reason: 1}
    assert by_name(raw) == by_name(read(tmp_path / "good"))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file_is_named(tmp_path: Path, missing: int) -> None:
    paths = write(tmp_path)
    paths[missing].unlink()
    with pytest.raises(UserError, match=rf"{paths[missing].name}: cannot be read \(No such file"):
        read_tables(*paths, skip_bad=True)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    _, items = write(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_tables(tmp_path, items)


def test_images_must_be_given_to_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--images"):
        read_tables(*write(tmp_path), modalities=("image",))
