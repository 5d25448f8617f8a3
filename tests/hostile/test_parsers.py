"""Hypothesis on what reads matrices, settings, records and sources: it reads what it is given, or says one line.

A few examples of each in the usual tests, ten minutes of them in ``tox -e slow``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hostile.cases import places, replaced
from hostile.family_matrices import PLAIN, changed
from hostile.family_texts import plain_records
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tpme.bench.errors import UserError
from tpme.bench.parsing import parse_json, parse_toml
from tpme.bench.record import read_result
from tpme.bench.run.matrix import MatrixFile, load_matrix
from tpme.bench.run.settings import apply_setting
from tpme.bench.task.sources.iisan import read_iisan
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.table_files import TableFile
from tpme.bench.task.sources.tables import read_tables

SLOW_MINUTES = 10
EXAMPLES = 25

Check = Callable[[Any, Path], None]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
numbers = st.one_of(
    st.integers(-(2**80), 2**80), st.floats(), st.sampled_from([0, 1, 2**31, 2**63, 10**12, 1e308, -0.0])
)
values = st.recursive(
    st.one_of(st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
SIGNS = [
    "a", "b.c", "'", '"', '"""', "=", "[", "]", "[[", "]]", "{", "}", ",", "\n", " ", "#", "\\", "\\u0000", "\\ud800",
    "1", "0x", "9" * 50, "1e999", "nan", "inf", "true", "1979-05-27", ":", "null", "NaN", "\t", "\x00", "é", "\u202e",
    "[" * 100, "{'a':" * 70, "a." * 70,
]  # fmt: skip
signs = st.lists(st.sampled_from(SIGNS), max_size=40).map("".join)


def check_toml(text: str, _folder: Path) -> None:
    """What is read is TOML within the limits: it can be written and read again."""
    read = parse_toml(text, "text")
    assert parse_toml(tomli_w.dumps(read), "again") == read


def check_json(text: str, _folder: Path) -> None:
    """What is read is JSON within the limits, and is read the same again."""
    read = parse_json(text, "text")
    assert parse_json(json.dumps(read, allow_nan=False), "again") == read


def check_matrix(raw: dict[str, Any], folder: Path) -> None:
    """A matrix that is read has a name that is one folder, and is the same once written and read again."""
    path = folder / "matrix.toml"
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    matrix = load_matrix(str(path))
    assert (folder / matrix.name).parent == folder
    assert type(matrix.training.epochs) is int
    text = matrix.model_dump_json()
    assert MatrixFile.model_validate_json(text).model_dump_json() == text


def check_setting(setting: str, _folder: Path) -> None:
    """A setting that is taken leaves a tree that a matrix is read from, or refused."""
    raw = copy.deepcopy(PLAIN)
    apply_setting(raw, setting)


def check_record(content: bytes, folder: Path) -> None:
    """A record that is read is the same once written and read again."""
    path = folder / "attempt-1.json"
    path.write_bytes(content)
    record = read_result(path)
    path.write_text(record.model_dump_json(), encoding="utf-8")
    assert read_result(path) == record


def check_raw(raw: RawData) -> None:
    """Items are unique lines of text that can be written, and histories point at them."""
    assert len(set(raw.items)) == len(raw.items)
    assert "\n" not in "".join([*raw.items, *raw.users])
    "".join([*raw.items, *raw.users, *(raw.titles or ())]).encode("utf-8")
    assert all((history >= 0).all() and (history < len(raw.items)).all() for history in raw.histories)


def check_tables(content: tuple[bytes, bytes, str, bool], folder: Path) -> None:
    """Two tables that are read give valid raw data."""
    items, events, suffix, skip = content
    files = {"items": items, "interactions": events}
    for kind, text in files.items():
        (folder / f"{kind}.{suffix}").write_bytes(text)
    interactions, catalogue = (TableFile(folder / f"{kind}.{suffix}", kind) for kind in ("interactions", "items"))
    check_raw(read_tables(interactions, catalogue, modalities=("text",), skip_bad=skip))


def check_iisan(content: tuple[bytes, bytes, bool], folder: Path) -> None:
    """A release folder that is read gives valid raw data."""
    items, users, skip = content
    (folder / "items.tsv").write_bytes(items)
    (folder / "users.tsv").write_bytes(users)
    check_raw(read_iisan(folder, modalities=("text",), skip_bad=skip))


def rows(columns: tuple[str, ...]) -> st.SearchStrategy[bytes]:
    """Lines of CSV, JSON or tabs, mostly whole, with bytes of any kind in between."""
    field = st.one_of(st.sampled_from(["a", "b", "c", "1", "2", "", "nan", "1e400", "9" * 5000, '"']), texts)
    fields = st.lists(field, min_size=len(columns), max_size=len(columns))
    line = st.one_of(
        fields.map(lambda row: json.dumps(dict(zip(columns, row, strict=True))).encode()),
        fields.map(lambda row: ",".join(row).encode()),
        fields.map(lambda row: "\t".join(row).encode()),
        st.dictionaries(st.sampled_from(columns), values).map(lambda row: json.dumps(row).encode()),
        st.binary(max_size=30),
    )
    return st.lists(line, max_size=8).map(lambda lines: b"\n".join([",".join(columns).encode(), *lines]))


_RECORD = plain_records()[1]
_BYTES = json.dumps(_RECORD).encode()
edits = st.lists(st.tuples(st.integers(0, len(_BYTES) - 1), st.binary(max_size=4)), min_size=1, max_size=4)


def edited(changes: list[tuple[int, bytes]]) -> bytes:
    """The bytes of a record with other ones at some places."""
    content = _BYTES
    for place, new in changes:
        content = content[:place] + new + content[place + len(new) :]
    return content


CHECKS: dict[str, tuple[Check, st.SearchStrategy[Any]]] = {
    "toml": (check_toml, signs),
    "json": (check_json, signs),
    "matrix": (
        check_matrix,
        st.builds(lambda place, value: replaced(PLAIN, place, value), st.sampled_from(places(PLAIN)[1:]), values),
    ),
    "matrix-key": (check_matrix, st.builds(lambda key, value: PLAIN | {key: value}, texts, values)),
    "matrix-training": (
        check_matrix,
        st.builds(lambda key, value: changed(f"training.{key}", value), st.sampled_from(["epochs", "heads"]), values),
    ),
    "setting": (check_setting, st.builds("{}={}".format, st.one_of(texts, signs), st.one_of(texts, signs))),
    "record": (
        check_record,
        st.builds(
            lambda place, value: json.dumps(replaced(_RECORD, place, value)).encode(),
            st.sampled_from(places(_RECORD)),
            st.one_of(st.none(), values),
        ),
    ),
    "record-bytes": (check_record, edits.map(edited)),
    "tables": (
        check_tables,
        st.tuples(
            rows(("item", "title")),
            rows(("user", "item", "timestamp")),
            st.sampled_from(["csv", "tsv", "jsonl"]),
            st.booleans(),
        ),
    ),
    "iisan": (check_iisan, st.tuples(rows(("item", "title")), rows(("user", "items")), st.booleans())),
}


def fuzz(name: str, folder: Path, number: int, examples: int) -> None:
    """Run a check on ``examples`` inputs drawn with the seed ``number``; an error that is one line is in order."""
    check, strategy = CHECKS[name]

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        with contextlib.suppress(UserError):
            check(value, folder)

    run()


@pytest.mark.parametrize("name", CHECKS)
def test_a_parser_reads_or_says_one_line(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, 0, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_parser_reads_or_says_one_line_for_minutes(name: str, tmp_path: Path) -> None:
    end = time.monotonic() + 60 * SLOW_MINUTES / len(CHECKS)
    number = time.time_ns()
    while time.monotonic() < end:
        number += 1
        fuzz(name, tmp_path, number, 500)
