"""Cuts out of texts what must not leave this machine: credentials; in what one publishes, home folders and host name.

``without_credentials`` is for every message, ``publishable`` for records and the files beside them. The time is linear
in the length of a text, whatever it holds: what a pattern may look through in vain is bounded.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

CUT = "***"
SHORTEST = 8
"""Characters of the value of a secret variable; a shorter one, such as ``true``, may stand anywhere by chance."""
_SECRET = (
    r"(?:(?<![A-Za-z0-9])(?:TOKEN|SECRET|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY(?:_ID)?|PRIVATE_?KEY|AUTH)"
    r"|PASSW(?:OR)?D|_(?:PASS|PAT|PWD))"
)
"""In the name of a variable."""
_SECRET_NAME = re.compile(rf"{_SECRET}(?:_(?!(?:PATH|FILE|DIR|SOCK|URL|TYPE)$)|$)")
_IS = r"""(?:\\?['"])?[ \t]*[=:][ \t]*"""
_VALUE = r"""(?:\*{3}|\\?'[^'\n]*'?|\\?"[^"\n]*"?|[^\s&;]*[^\s&;,])"""
_WORDS = ("auth", "bearer", "cookie", "credential", "key", "pass", "_pat", "pwd", "secret", "sig", "token")
"""One of them is in every text that a pattern of ``_NAMED`` finds something in."""
_NAMED = tuple(
    (re.compile(pattern), rf"\1{CUT}")
    for pattern in (
        # A parameter of an address.
        r"(?i)([?&;](?:[\w-]{0,50}(?:token|secret|passw(?:or)?d|key|signature)|pwd|sig|auth)=)[^\s&;#'\"]+",
        # An option of a command line, which may be the list that Python prints.
        rf"(?i)((?<![\w-])--?[a-z-]{{0,40}}(?:token|secret|passw(?:or)?d|api-key)(?:=|[ \t]+|['\"],[ \t]*)){_VALUE}",
        # NAME=value and "name": "value"; words that are common by themselves only before what looks like a secret.
        rf"({_SECRET}(?:_[A-Z0-9_]{{0,60}})?{_IS}){_VALUE}",
        rf"(?i)((?:passw(?:or)?d|passphrase|api[_-]?key|(?:access|auth|bearer|secret|client|private)[_-]?"
        rf"(?:token|key|secret)){_IS}){_VALUE}",
        rf"(?i)((?:token|secret|signature|credential){_IS}['\"]?)(?=[\w.~+/-]*\d)(?=[\w.~+/-]*[a-z])[\w.~+/-]{{16,}}",
        # Headers of a request.
        rf"(?i)(authorization{_IS}['\"]?(?:(?:basic|bearer|token|digest|negotiate|aws4-hmac-sha256)[ \t]+)?)[^\s,'\"]+",
        r"(?i)(\bbearer[ \t]+)(?:(?=[\w.~+/-]*\d)[\w.~+/=-]{8,}|[\w.~+/=-]{20,})",
        rf"(?i)(cookie{_IS}['\"]?)[^\n'\"]+",
    )
)
_BY_FORM = (
    # scheme://user:password@host, with one slash in a path; a password may hold "/" or "@" that should be escaped.
    (
        re.compile(
            r"(:/(?:/|(?<=http:/)|(?<=https:/)))"
            r"(?:[^\s/?#]{0,1000}@|[^\s/@:]{1,200}:(?!\d{1,5}[/?#])\S{0,1000}@)"
        ),
        rf"\1{CUT}@",
    ),
    # Tokens of Hugging Face, GitHub, GitLab, Slack, PyPI, Databricks, OpenAI, Google and AWS, and JSON web tokens.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
            r"|xox[abeprs]-[\w-]{10,}|pypi-AgE[\w-]{16,}|dapi[0-9a-f]{32}|sk-(?=[\w-]{0,100}\d)[\w-]{20,}"
            r"|AIza[\w-]{30,}|A[KS]IA[A-Z0-9]{16}\b|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
        ),
        CUT,
    ),
)


def without_credentials(text: str) -> str:
    """``text`` with ``***`` for every password and token: in addresses, variables, options, and by their form.

    So is the value of each variable of this process whose name says that it is secret.
    """
    for value in _secret_values():
        text = text.replace(value, CUT)
    lower = text.lower()
    named = _NAMED if any(word in lower for word in _WORDS) else ()
    for pattern, replacement in (*_BY_FORM, *named):
        text = pattern.sub(replacement, text)
    return text


def publishable(text: str) -> str:
    """``text`` without credentials, home folders (``~``, others as ``/home/***``) and the name of this host."""
    text = without_home(without_credentials(text))
    if "/home/" in text or "/Users/" in text:
        text = re.sub(r"(?<![\w.])(/home|/Users)/(?!\*{3})[^\s/:,;'\")]+", rf"\1/{CUT}", text)
    for name in _host_names():
        if name in text:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", CUT, text)
    return text


def without_home(text: str) -> str:
    """``text`` with ``~`` for the home folder of this user, where a path begins with it."""
    for home in _homes(os.path.expanduser("~")):  # noqa: PTH111 - Path.home() raises where it is not known
        if home in text:
            text = re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", text)
    return text


def redact_file(path: Path) -> None:
    """Rewrite a log, line by line, as one may publish it; one that is not there stays so."""
    if not path.is_file():
        return
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with (
            path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines,
            os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as out,
        ):
            out.writelines(map(publishable, lines))
        shutil.copymode(path, temporary)
        Path(temporary).replace(path)
    except OSError as error:  # that of a full disk names no file
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _secret_values() -> Iterable[str]:
    """Values of secret variables, the longest first: one may be part of another."""
    values = (os.environ.get(name, "") for name in os.environ if _is_secret(name))
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


@cache
def _is_secret(name: str) -> bool:
    """Whether the name of a variable says that its value is secret."""
    return _SECRET_NAME.search(name.upper()) is not None


@cache
def _homes(home: str) -> tuple[str, ...]:
    """The home folder as its user names it and without links; none where it is not known."""
    both = {home, os.path.realpath(home)} - {"/"}
    return tuple(sorted(both, key=len, reverse=True)) if home.startswith("/") else ()


def _host_names() -> Iterable[str]:
    name = socket.gethostname()
    return [one for one in (name, name.partition(".")[0]) if len(one) > 3 and one != "localhost"]
