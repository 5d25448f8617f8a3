"""Names of matrices, data sets and whatever else becomes a folder or a key."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from tpme.bench.text import is_visible

LONGEST_LINE = 1000
LONGEST_NAME = 100
"""In characters; twice as many bytes, so that a file system takes the name with an ending."""


def check_name(name: str) -> str:
    """``name`` if it can be a folder below another one and a word on a command line; else raises ValueError."""
    if not name:
        raise ValueError("a name cannot be empty")
    if len(name) > LONGEST_NAME or len(name.encode("utf-8", "replace")) > 2 * LONGEST_NAME:
        raise ValueError(
            f"a name has at most {LONGEST_NAME} characters ({2 * LONGEST_NAME} bytes), this has {len(name)}"
        )
    if "/" in name or "\\" in name:
        raise ValueError("a name cannot hold a slash or a backslash: it becomes one folder")
    if name[0] in ".-":
        raise ValueError("a name cannot begin with a dot or a dash")
    if name != name.strip():
        raise ValueError("a name cannot begin or end with a space")
    return check_line(name)


def check_line(text: str) -> str:
    """``text`` if every character of it is seen and there are not too many; else raises ValueError."""
    if len(text) > LONGEST_LINE:
        raise ValueError(f"at most {LONGEST_LINE} characters, this has {len(text)}")
    if hidden := next((character for character in text if not is_visible(character)), None):
        raise ValueError(f"it cannot hold the character {hidden!a}")
    return text


Line = Annotated[str, AfterValidator(check_line)]
"""At most 1000 visible characters."""
Name = Annotated[str, AfterValidator(check_name)]
"""1 to 100 visible characters without a slash, a backslash, a leading dot or dash, and spaces around it."""
