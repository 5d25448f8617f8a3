"""Generic tables: order in time, chosen column names, MicroLens as published, and every kind of broken row."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tpme.bench import cli
from tpme.bench.errors import UserError
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.table_files import TableFile
from tpme.bench.task.sources.tables import Columns, read_tables

ITEMS = "item,title\n" + "".join(f'{n},"Title, {n}"\n' for n in range(1, 8))
INTERACTIONS = "user,item,timestamp\n" + "".join(f"{u},{(n + u) % 7 + 1},{n}\n" for u in (2, 1) for n in range(6))


def write(
    folder: Path, interactions: str | bytes = INTERACTIONS, items: str | bytes = ITEMS
) -> tuple[TableFile, TableFile]:
    folder.mkdir(exist_ok=True)
    paths = folder / "pairs.csv", folder / "items.csv"
    for path, content in zip(paths, (interactions, items), strict=True):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return TableFile(paths[0], "interactions"), TableFile(paths[1], "items")


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
    options = ["--interactions", pairs.path, "--items", titles.path, "--images", covers, "--image-size", 8]
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


# --- kinds of files ----------------------------------------------------------------------------------------


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def as_jsonl(text: str) -> str:
    """Numbers as numbers, titles as text."""
    return "".join(
        json.dumps({key: int(value) if value.isdigit() else value for key, value in row.items()}) + "\n"
        for row in rows(text)
    )


def save_parquet(path: Path, text: str) -> None:
    frame = pd.DataFrame(rows(text))
    for column in ("user", "item"):
        if column in frame:
            frame[column] = frame[column].astype(int)
    if "timestamp" in frame:
        frame["timestamp"] = pd.to_datetime(frame["timestamp"].astype(int), unit="s")
    frame.to_parquet(path)


def other_kind(folder: Path, kind: str) -> list[Path | str]:
    """The tables of this module in another kind of file, as arguments of the command."""
    texts = {"interactions": INTERACTIONS, "items": ITEMS}
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    arguments: list[Path | str] = []
    for name, text in texts.items():
        path = folder / f"{name}.{kind}"
        arguments += [f"--{name}", path]
        if kind == "parquet":
            save_parquet(path, text)
            continue
        if kind == "jsonl":
            text = as_jsonl(text)
        elif kind in ("tsv", "txt", "semicolon.csv"):
            sign = ";" if kind == "semicolon.csv" else "\t"
            text = "".join(sign.join(row) + "\n" for row in csv.reader(io.StringIO(text)))
            arguments += {"txt": ["--delimiter", "tab"], "semicolon.csv": ["--delimiter", ";"]}.get(kind, [])
        elif kind == "headless.csv":
            header, _, text = text.partition("\n")
            arguments += [f"--{name}-header", header]
        path.write_text(text)
    return arguments


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> int:
    monkeypatch.setattr("sys.argv", ["tpme", "prepare", "tables", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("kind", ["tsv", "txt", "semicolon.csv", "headless.csv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert prepare(monkeypatch, *other_kind(tmp_path, kind), tmp_path / "data") == 0
    pairs, items = write(tmp_path)
    assert prepare(monkeypatch, "--interactions", pairs.path, "--items", items.path, tmp_path / "same") == 0
    found, same = (Dataset.open(tmp_path / name).manifest for name in ("data", "same"))
    assert found.fingerprint == same.fingerprint


def test_microlens_titles_have_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pairs, titles = tmp_path / "MicroLens-50k_pairs.csv", tmp_path / "MicroLens-50k_titles.csv"
    pairs.write_text(INTERACTIONS)
    titles.write_text("".join(f'{n},"Title, {n}"\n' for n in range(1, 8)))
    arguments = ["--interactions", pairs, "--items", titles, tmp_path / "data"]
    assert prepare(monkeypatch, *arguments) == 2
    assert "titles.csv, line 1: no column 'item' in the header (1, Title, 1)" in (told := capsys.readouterr().err)
    assert told.endswith("name the columns of a file without a header with --items-header item,title\n")
    assert prepare(monkeypatch, "--items-header", "item,title", *arguments) == 0
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.manifest.items == 7


@pytest.mark.parametrize(("sign", "named"), [(";", "';'"), ("\t", "tab")])
def test_another_delimiter_is_suggested(tmp_path: Path, sign: str, named: str) -> None:
    with pytest.raises(UserError, match=f"its delimiter may be another: --delimiter {named}$"):
        read(tmp_path, INTERACTIONS.replace(",", sign))


@pytest.mark.parametrize("delimiter", ["::", "", '"'])
def test_a_delimiter_is_one_character(tmp_path: Path, monkeypatch, capsys, delimiter: str) -> None:
    arguments = ["--interactions", tmp_path / "a", "--items", tmp_path / "b", tmp_path / "data"]
    assert prepare(monkeypatch, *arguments, "--delimiter", delimiter) == 2
    assert "give one character, or the word tab" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"item": 8}', "no 'title' \\(item\\); choose one with --title-column"),
        ('{"item": 8, "title": ["a"]}', "'title' is neither text nor a number"),
        ("[8, 9]", "not a JSON object"),
        ('{"item": 8, "title', "not JSON"),
    ],
)
def test_a_bad_line_of_json_is_named_and_can_be_skipped(tmp_path: Path, line: str, message: str) -> None:
    pairs, _ = write(tmp_path)
    items = TableFile(tmp_path / "items.jsonl", "items")
    items.path.write_text(as_jsonl(ITEMS) + line + "\n\n")
    with pytest.raises(UserError, match=rf"items\.jsonl, line 8: {message}"):
        read_tables(pairs, items)
    assert read_tables(pairs, items, skip_bad=True).skipped == {"malformed row": 1}


def test_numbers_of_json_stay_exact_and_null_is_empty(tmp_path: Path) -> None:
    pairs = TableFile(tmp_path / "pairs.jsonl", "interactions")
    lines = [{"user": "a", "item": item, "timestamp": 1583378629552000000 + place} for item, place in ((1, 2), (2, 1))]
    pairs.path.write_text("\n".join(map(json.dumps, lines)))
    _, items = write(tmp_path)
    assert by_name(read_tables(pairs, items)) == {"a": ["2", "1"]}
    items = TableFile(tmp_path / "items.jsonl", "items")
    items.path.write_text('{"item": 1, "title": null}')
    with pytest.raises(UserError, match="line 1: item '1' has an empty title"):
        read_tables(pairs, items)


def test_what_is_wrong_with_a_parquet_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    pairs, _ = write(tmp_path)
    items = TableFile(tmp_path / "items.parquet", "items")
    with pytest.raises(UserError, match=r"items\.parquet: cannot be read"):
        read_tables(pairs, items)
    items.path.write_text(ITEMS)
    with pytest.raises(UserError, match=r"items\.parquet: not a Parquet file"):
        read_tables(pairs, items)
    pd.DataFrame({"item": [1, 2], "name": ["a", None]}).to_parquet(items.path)
    with pytest.raises(UserError, match=r"no column 'title' \(item, name\); choose with --title-column"):
        read_tables(pairs, items)
    with pytest.raises(UserError, match=r"items\.parquet, row 2: item '2' has an empty title"):
        read_tables(pairs, items, columns=Columns(title="name"))
    with pytest.raises(UserError, match=r"items\.parquet: names its columns itself; leave --items-header out"):
        read_tables(pairs, TableFile(items.path, "items", header=("item", "title")))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"items\.parquet: Parquet needs pyarrow: pip install .*\[export\]'$"):
        read_tables(pairs, items)


@pytest.mark.parametrize("place", ["beside", "folder", "zip"])
def test_a_column_names_the_images(tmp_path: Path, place: str) -> None:
    covers = tmp_path / "covers" / "b"
    covers.mkdir(parents=True)
    for shade in (10, 200):
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(covers / f"{shade}.png")
    images = {"beside": None, "folder": tmp_path / "covers", "zip": tmp_path / "covers.zip"}[place]
    if place == "zip":
        shutil.make_archive(str(tmp_path / "covers"), "zip", tmp_path / "covers")
    below = "covers/b" if place == "beside" else "b"
    rows = f"1,x,{below}/200.png\n2,y,./{below}/10.png\n3,z,{below}/200.png\n"
    pairs, items = write(tmp_path, "user,item,timestamp\nu,1,1\nu,2,2\nu,3,3\n", f"item,title,cover\n{rows}")
    raw = read_tables(pairs, items, images=images, columns=Columns(image="cover"))
    assert raw.pictures is not None
    assert raw.titles == ["x", "y", "z"]
    assert [int(picture(4).mean()) for picture in raw.pictures] == [200, 10, 200]
    write(tmp_path, items=f"item,title,cover\n{rows}4,v,{below}/no.png\n5,w,\n")
    with pytest.raises(UserError, match=rf"items\.csv, line 5: item '4' has no image '{below}/no.png' in "):
        read_tables(pairs, items, images=images, columns=Columns(image="cover"))
    write(tmp_path, "user,item,timestamp\nu,1,1\nu,4,2\n", items=f"item,title,cover\n{rows}4,v,{below}/no.png\n5,w,\n")
    raw = read_tables(pairs, items, images=images, columns=Columns(image="cover"), skip_bad=True)
    assert raw.skipped == {"missing image": 2, "interaction with a skipped item": 1}


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
    paths[missing].path.unlink()
    with pytest.raises(UserError, match=rf"{paths[missing].path.name}: cannot be read \(No such file"):
        read_tables(*paths, skip_bad=True)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    _, items = write(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        read_tables(TableFile(tmp_path, "interactions"), items)


def test_images_must_be_given_to_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--images"):
        read_tables(*write(tmp_path), modalities=("image",))
