from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tpme.bench.names import Name

NAME: TypeAdapter[str] = TypeAdapter(Name)


@pytest.mark.parametrize("name", ["demo", "Amazon Scientific", "données", "a.b-c_d", "[x]", "=1", "x" * 100])
def test_a_name_is_kept(name: str) -> None:
    assert NAME.validate_python(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        (".", "dot"),
        ("..", "dot"),
        ("../up", "slash"),
        ("/tmp/there", "slash"),
        ("a\\b", "backslash"),
        ("-rf", "dash"),
        (".hidden", "dot"),
        (" a", "space"),
        ("a\u00a0", "space"),
        ("a\x00b", r"\\x00"),
        ("a\nb", r"\\n"),
        ("a\u202eb", r"\\u202e"),
        ("a\ud800", r"\\ud800"),
        ("x" * 101, "at most 100"),
        ("字" * 90, "bytes"),
    ],
)
def test_what_is_no_name_says_why(name: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        NAME.validate_python(name)


@given(st.text(st.characters(exclude_categories=()), max_size=120))
def test_a_name_is_one_folder_below_another(name: str) -> None:
    try:
        NAME.validate_python(name)
    except ValidationError:
        return
    assert Path("/a", name).parts == ("/", "a", name)
    assert len(name.encode("utf-8")) <= 200
