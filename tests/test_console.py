from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table
from rich.text import Text

from tpme.bench.console import PlainConsole, complain, replace_unencodable

HOSTILE = "[/][red]:skull:\x1b[31m\u202e\x9b\x00"
SHOWN = r"[/][red]:skull:\x1b[31m\u202e\x9b\x00"


def test_text_of_any_kind_is_printed_as_it_is() -> None:
    console = PlainConsole(file=io.StringIO(), width=200)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    console.print(HOSTILE, Text(HOSTILE, "bold"), table, sep="\n")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count(SHOWN) == 6
    assert not set(text) & set("\x1b\u202e\x9b\x00")


def test_a_terminal_still_gets_colours() -> None:
    console = PlainConsole(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text(HOSTILE, "red"))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == f"\x1b[31m{SHOWN}\x1b[0m\n"


def test_a_complaint_is_one_bounded_line(capsys: pytest.CaptureFixture[str]) -> None:
    complain(f"{'x' * 100_000}{HOSTILE}\nsecond line: no such file")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("tpme: xxx")
    assert error.endswith(rf"{SHOWN}\nsecond line: no such file" + "\n")
    assert len(error) < 1100


def test_a_complaint_has_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    complain("http://user:PASSWORD@host: no such file")
    assert capsys.readouterr().err == "tpme: http://***@host: no such file\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_stdout_lacks_is_an_escape(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    replace_unencodable()
    print("名")
    complain("名")
    for name, text in (("stdout", b"\\u540d\n"), ("stderr", b"tpme: \\u540d\n")):
        stream = getattr(sys, name)
        stream.flush()
        assert stream.buffer.getvalue() == text
