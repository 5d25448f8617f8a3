"""Text of unknown origin made safe for one line of a terminal or of a file that a program interprets."""

from __future__ import annotations

import re
import unicodedata

JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiner: Persian, Indic scripts and emoji are spelt with them."""
HIDDEN = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))
"""Unicode's categories of what is not seen: control, format, unassigned, private, surrogate, line and paragraph."""


FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
"""What a text begins with that a spreadsheet would compute."""


def visible(text: object, most: int = 200) -> str:
    r"""``text`` as one printable line of at most ``most`` characters; what is longer is cut in the middle by ``...``.

    Control characters, line breaks, bidirectional and other invisible format characters, lone surrogates and
    unassigned code points become backslash escapes (``\x1b``, ``\u202e``); printable text of any script stays.
    """
    try:
        string = str(text)
    except Exception:  # an exception of a plug-in, an integer of thousands of digits
        string = f"<{type(text).__name__}>"
    if len(string) <= most and string.isascii() and string.isprintable():
        return string
    head, tail = escaped(string[:most]), escaped(string[most:][-most:])
    if len(string) <= 2 * most and len(head + tail) <= most:
        return head + tail
    room = max(most - 3, 0)
    end = (head + tail)[len(head + tail) - room // 3 :]
    return f"{head[: room - len(end)]}...{end}"


def is_visible(character: str) -> bool:
    """Whether a character may stand in a line as it is."""
    return unicodedata.category(character) not in HIDDEN or character in JOINERS


def escaped(text: str) -> str:
    """``text`` of any length with escapes for what is not seen; see ``visible``."""
    return _NOT_ASCII.sub(_escape, text)


def escaped_lines(text: str) -> str:
    """As ``escaped``, but line breaks stay: for a whole file."""
    return "\n".join(map(escaped, text.split("\n")))


def escaped_json(text: str) -> str:
    r"""A text in JSON with ``\u`` escapes for what is not seen, its line breaks aside: the same value."""
    return _NOT_ASCII.sub(_escape_json, text)


def csv_field(value: str | float | None) -> str | float:
    """A field of CSV: a text on one line, behind an apostrophe where a spreadsheet would take it for a formula."""
    if not isinstance(value, str):
        return "" if value is None else value
    return escaped(f"'{value}" if value.startswith(FORMULA) else value)


_NOT_ASCII = re.compile(r"[^ -~]")


def _escape(found: re.Match[str]) -> str:
    return found[0] if is_visible(found[0]) else found[0].encode("unicode_escape").decode("ascii")


def _escape_json(found: re.Match[str]) -> str:
    if found[0] == "\n" or is_visible(found[0]):
        return found[0]
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(rf"\u{units[place : place + 4]}" for place in range(0, len(units), 4))
