"""Sources of data sets: texts in items, users, titles, columns and folders, and lines that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hostile.cases import TEXTS, Case

COUNT = 6
PLACES = ("item", "title", "user", "unknown-item", "twice", "column", "header", "folder", "time")


def iisan(place: str, text: str, skip: bool, folder: Path) -> list[str]:
    """A release folder of IISAN with a text in one place."""
    name = text.replace("\0", "").replace("/", "")[:60] if place == "folder" else "source"
    source = folder / (name if name.strip(". ") else "source")
    source.mkdir()
    items = [f"item{number}" for number in range(COUNT)]
    titles = [f"title {number}" for number in range(COUNT)]
    users = ["user"]
    history = list(items)
    if place == "item":
        items[0] = history[0] = text
    elif place == "title":
        titles[0] = text
    elif place == "user":
        users[0] = text
    elif place == "unknown-item":
        history[0] = text
    elif place == "twice":
        items[0] = items[1] = history[0] = text
    rows = [f"{item}\t{title}" for item, title in zip(items, titles, strict=True)]
    (source / "items.tsv").write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    (source / "users.tsv").write_bytes(f"{users[0]}\t{' '.join(history)}\n".encode("utf-8", "surrogateescape"))
    arguments = ["prepare", "iisan", source.name, "data", "--modalities", "text", "--workers", "1"]
    return [*arguments, *(["--skip-bad"] if skip else [])]


def tables(place: str, text: str, suffix: str, folder: Path) -> list[str]:
    """Two tables with a text in one place."""
    items = [{"item": f"item{number}", "title": f"title {number}"} for number in range(COUNT)]
    events = [{"user": "user", "item": f"item{number}", "timestamp": str(number)} for number in range(COUNT)]
    if place in ("item", "title"):
        items[0][place] = text
    elif place == "user":
        events = [event | {"user": text} for event in events]
    elif place == "unknown-item":
        events[0]["item"] = text
    elif place == "twice":
        items[0]["item"] = items[1]["item"] = text
    elif place == "time":
        events[0]["timestamp"] = text
    elif place == "header":
        items = [{text: entry["item"], "title": entry["title"]} for entry in items]
    for name, rows in (("items", items), ("events", events)):
        lines = [json.dumps(row) for row in rows]
        if suffix == "csv":
            fields = [list(rows[0]), *(list(row.values()) for row in rows)]
            lines = [",".join('"' + field.replace('"', '""') + '"' for field in line) for line in fields]
        (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["prepare", "tables", "data", "--interactions", f"events.{suffix}", "--items", f"items.{suffix}"]
    column = text.replace("\0", "")[:1000]
    return [*arguments, f"--title-column={column}"] if place == "column" else arguments


LINES: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "closed": b'{"item": ' + b"[" * 900 + b"]" * 900 + b"}",
    "digits": b'{"item": ' + b"9" * 10_000 + b', "title": "x"}',
    "surrogate": b'{"item": "\\ud800", "title": "\\udfff"}',
    "nan": b'{"item": NaN, "title": Infinity}',
    "nul": b'{"item": "\\u0000", "title": "\\u0000"}',
    "not-utf-8": b'{"item": "\xff", "title": "x"}',
    "utf-16": '{"item": "a"}'.encode("utf-16"),
    "quote": b'"' * 3001,
    "long-line": b"x" * (1 << 20),
    "returns": b"a\rb\rc\r\n" * 100,
    "twice": b'{"item": "a", "item": "b", "title": "x"}',
    "list": b'["a", "b"]',
    "number": b"1",
    "empty": b"",
    "nuls": b"\0" * 4096,
}


def lines(content: bytes, suffix: str, skip: bool, folder: Path) -> list[str]:
    """A table of items that is none."""
    (folder / f"items.{suffix}").write_bytes(content + b"\n")
    (folder / f"events.{suffix}").write_bytes(content + b"\n")
    arguments = ["prepare", "tables", "data", "--interactions", f"events.{suffix}", "--items", f"items.{suffix}"]
    return [*arguments, *(["--skip-bad"] if skip else [])]


def cases() -> Iterator[Case]:
    """Yield texts x places of both sources, and files of lines x formats."""
    for number, (name, text) in enumerate(TEXTS.items()):
        for place in PLACES:
            if place not in ("column", "header", "time"):
                yield Case(f"iisan-{place}-{name}", partial(iisan, place, text, number % 2 == 0))
            if place != "folder":
                suffix = ("csv", "jsonl")[number % 2]
                yield Case(f"tables-{suffix}-{place}-{name}", partial(tables, place, text, suffix))
    for name, content in LINES.items():
        for suffix in ("csv", "tsv", "jsonl", "parquet"):
            for skip in (False, True):
                yield Case(f"lines-{name}-{suffix}{'-skip' * skip}", partial(lines, content, suffix, skip))
