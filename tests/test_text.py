from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from tpme.bench.text import HIDDEN, JOINERS, visible


def test_printable_text_of_any_script_stays() -> None:
    for text in (
        "lora",
        "SciBERT → TPME",
        "مجموعه\u200cداده",
        "データ",
        "👩\u200d💻",
        "C:\\data",
        "[/] =1+1",
        "e\u0301",
    ):
        assert visible(text) == text


def test_what_a_terminal_acts_on_is_shown_as_an_escape() -> None:
    assert visible("a\x1b[31mb\r\n\t\x7f\x9b") == r"a\x1b[31mb\r\n\t\x7f\x9b"
    assert visible("\u202eabc\u2066\u2028\ufeff\ud800\U000e0041") == r"\u202eabc\u2066\u2028\ufeff\ud800\U000e0041"


def test_long_text_keeps_its_beginning_and_its_end() -> None:
    cut = visible("/folder" * 100 + ": no such file", 60)
    assert len(cut) == 60
    assert cut.startswith("/folder/folder")
    assert cut.endswith(": no such file")
    assert "..." in cut
    assert visible("abc", 3) == "abc"
    assert visible("\n\n", 3) == "..."


def test_what_has_no_text_is_named_by_its_type() -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert visible(SilentError()) == "<SilentError>"
    assert visible(10**5000) == "<int>"


@given(st.text(st.characters(exclude_categories=()), max_size=300), st.integers(3, 120))
def test_every_text_is_one_bounded_visible_line(text: str, most: int) -> None:
    shown = visible(text, most)
    assert len(shown) <= most
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert [c for c in shown if unicodedata.category(c) in HIDDEN and c not in JOINERS] == []
    assert visible(shown, most) == shown
