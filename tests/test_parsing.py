from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpme.bench.errors import UserError
from tpme.bench.parsing import read_json, read_toml


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "file"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_values_stay(tmp_path: Path) -> None:
    assert read_toml(written(tmp_path, 'a.b = [1, 2.5, "é", -9223372036854775808]')) == {
        "a": {"b": [1, 2.5, "é", -(2**63)]}
    }
    assert read_json(written(tmp_path, '[{"a": 18446744073709551615}, null, "\\u00e9"]')) == [
        {"a": 2**64 - 1},
        None,
        "é",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a = " + "[" * 100_000, "deeper"),
        ("a = " + "[" * 100 + "]" * 100, "a: nested deeper than 64"),
        ("b = 1\na" + ".a" * 40_000 + " = 1", "line 2: a key of more than 64 parts"),
        ("a = " + "9" * 5000, "more than 64 bits"),
        ("a = 0x" + "f" * 5000, "a: an integer of more than 64 bits"),
        ("a = {b = [18446744073709551616]}", "a: an integer of more than 64 bits"),
        ("a = ", "not a readable TOML file"),
        (b"a = '\xff'", r"not UTF-8 \(byte 5\)"),
        ("#" * 2**20 + "#", "larger than 1 MiB"),
    ],
    ids=range(9),
)
def test_toml_that_is_refused(tmp_path: Path, text: str | bytes, why: str) -> None:
    with pytest.raises(UserError, match=f"file: .*{why}"):
        read_toml(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "deeper"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ("[" + "[]," * 2**20 + "0]", "more than 1,048,576 tables and lists"),
        ("[" + "0," * (2**23 + 1) + "0]", "or 8,388,608 values"),
        ("9" * 5000, "more than 64 bits"),
        ('{"a": [-9223372036854775809]}', "a: an integer of more than 64 bits"),
        ('{"a": "\\ud800"}', "a: text with a lone surrogate"),
        ('{"\\ud800": 1}', "a lone surrogate"),
        ("{", "not JSON"),
        (b"\xff", "not UTF-8"),
    ],
    ids=range(10),
)
def test_json_that_is_refused(tmp_path: Path, text: str | bytes, why: str) -> None:
    with pytest.raises(UserError, match=f"file: .*{why}"):
        read_json(written(tmp_path, text))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=r"not a regular file"):
            read_json(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "a\x00b", tmp_path / ("x" * 300)):
        with pytest.raises(UserError):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
