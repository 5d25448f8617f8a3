"""Runs a case through the command line's own entry and judges what it did."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hostile.cases import Case

from tpme.bench import cli

LONGEST_LINE, MOST_CPU_S, MOST_WALL_S, MOST_BYTES = 1100, 20, 300, 2 << 30
"""Wall time is generous, because other programs may use the cores: only what waits for ever exceeds it."""
TEXT_FILES = (".md", ".html", ".csv", ".json", ".tex", ".xml", ".svg", ".toml")
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
ALLOWED = "\n\u200c\u200d"
INJECTED = "::error::three"
"""A line of the text ``newline``, which GitHub would take for an annotation."""
_written: list[str] | None = None
_EVENTS = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.symlink": 1,
    "os.link": 1,
    "os.truncate": 0,
}
"""Audit events of what changes a file system, and which argument is changed."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is None:
        return
    if event == "os.mkdir" and os.path.lexists(arguments[0]):
        return  # which changes nothing
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _written.append(os.fsdecode(arguments[0]))
    elif event in _EVENTS and isinstance(path := arguments[_EVENTS[event]], str | bytes | os.PathLike):
        _written.append(os.fsdecode(path))


sys.addaudithook(_audit)


def judge(case: Case, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a case in ``folder`` and check what everything hostile must keep to.

    The exit code is one of the case's, and there is no traceback; an error is one line of bounded length; nothing that
    is printed or written holds a control or bidirectional character; nothing is written outside ``folder`` and
    ``store``; and time and memory are bounded.
    """
    arguments = list(case.arrange(folder))
    allowed = [folder, store, Path(tempfile.gettempdir()), Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])]
    before = {path: _state(path) for path in _files(folder)}
    began = time.process_time()
    with _limits():
        code, out, error, written = _run(case, arguments, folder, monkeypatch)
    spent_s = time.process_time() - began
    shown = f"{arguments!r:.300}\ncode {code}\n{out[-2000:]}\n{error[-4000:]}"
    assert "Traceback (most recent call last)" not in out + error, shown
    assert code in (0, case.refused, *case.answers), shown
    assert _hidden(out + error) == "", shown
    lines = [line for line in error.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith(("tpme: ", "Error: "))]
    if code == case.refused:
        assert messages == lines[-1:], shown  # a second line of a message would be the last one
    assert not [line for line in (out + error).splitlines() if line.startswith(INJECTED)], shown
    assert max(map(len, [*messages, ""])) <= LONGEST_LINE, shown
    if case.says is not None:
        assert code == case.refused, shown
        assert re.search(case.says, messages[0]), shown
    outside = {path for path in written if not _is_below(path, allowed)}
    assert not outside, f"{shown}\nwritten outside: {sorted(outside)}"
    for path in _files(folder):
        if path.suffix in TEXT_FILES and before.get(path) != _state(path):
            assert (path.name, _hidden(path.read_text(encoding="utf-8"))) == (path.name, ""), shown
    assert spent_s < MOST_CPU_S, shown


def _run(
    case: Case, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str, list[str]]:
    global _written
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=case.encoding, newline="\n") for _ in range(2)]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tpme", *arguments])
    _written = []
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        written, _written = _written, None
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(case.encoding))  # type: ignore[attr-defined]
    return code, texts[0], texts[1], [os.path.join(folder, path) for path in written]  # noqa: PTH118


@contextmanager
def _limits() -> Iterator[None]:
    """Limits of time and memory for the time of a case."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"still running after {MOST_WALL_S} s")

    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, old[1]))
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(MOST_WALL_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def _hidden(text: str) -> str:
    """What is not seen in ``text``, as escapes."""
    doubtful = set(re.findall(r"[^ -~\n]", text))
    return ascii("".join(sorted(c for c in doubtful if unicodedata.category(c) in HIDDEN and c not in ALLOWED)))[1:-1]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _is_below(path: str, folders: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(Path(path).parent)) / Path(path).name
    return (
        "__pycache__" in path
        or path == "/dev/null"
        or any(real.is_relative_to(folder) or real == folder for folder in folders)
    )
