"""Texts in records, titles and options, through every command that shows or writes them."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from hostile.cases import TEXTS, Case

from tpme.bench.record import Cell, cell_id

RESULTS = Path(__file__).resolve().parents[2] / "results" / "demo" / "cells"
PLACES = (
    "cell.method", "cell.dataset", "cell.matrix", "cell.options.key", "cell.text_encoder.source", "dataset.name",
    "environment.device_name", "environment.device_key", "environment.allocator", "failure.message",
    "training_memory.host_rss_bytes.source", "epoch_time_s.reason", "code_version", "started_at",
)  # fmt: skip
COMMANDS: dict[str, list[str]] = {
    "report": ["report", "run", "--out", "out", "--formats", "csv,html,json,tex", "--show", "all"],
    "choose": ["choose", "run"],
    "choose-json": ["choose", "run", "--json"],
    "compare": ["compare", "run", "run"],
    "compare-json": ["compare", "run", "run", "--json"],
    "export": ["export", "run", "--out", "out.csv"],
    "board": ["board", "run"],
    "baseline": ["baseline", "run", "--out", "base.json"],
    "check": [
        "check", "run", "--baseline", "run", "--all", "--github", "--json", "c.json", "--markdown", "c.md",
        "--junit", "c.xml", "--benchmark-json", "b.json",
    ],
}  # fmt: skip
ANSWERS = {"choose": (1,), "choose-json": (1,), "check": (1, 2)}
OPTIONS: dict[str, list[str]] = {
    "title": ["report", "run", "--out", "out", "--formats", "csv,html,json,tex", "--title"],
    "rows": ["report", "run", "--rows"],
    "reference": ["report", "run", "--reference"],
    "weights": ["report", "run", "--weights"],
    "formats": ["report", "run", "--formats"],
    "show": ["report", "run", "--show"],
    "frame": ["report", "run", "--formats", "csv", "--frame"],
    "device": ["choose", "run", "--device"],
    "memory": ["choose", "run", "--max-memory"],
    "runs": ["report"],
    "baseline": ["check", "run", "--baseline"],
    "require": ["check", "run", "--baseline", "run", "--require"],
    "method": ["list", "methods"],
    "methods-path": ["list", "methods", "--methods-path"],
    "profile": ["plan", "demo", "--device-profile"],
    "log": ["run", "demo", "--device", "cpu", "--log"],
    "command": [],
    "option": ["report", "run", "--no-such-option"],
    "number": ["report", "run", "--workers"],
}


@cache
def plain_records() -> tuple[dict[str, Any], ...]:
    """Two small records of the demo: a baseline, and one that trained."""
    files = [min(RESULTS.glob(f"{method}-*/attempt-1.json")) for method in ("popularity", "id")]
    raw = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return tuple(
        record | {"files": {}, "digests": {}} if "digests" in record else record | {"files": {}} for record in raw
    )


def write_run(folder: Path, changes: dict[str, Any]) -> None:
    """A run folder with two records, in both of which the dotted places have other values; their ids fit."""
    for number, record in enumerate(copy.deepcopy(plain_records())):
        for place, value in changes.items():
            if place.startswith("failure."):
                record |= {"status": "error", "failure": {"phase": "train", "message": "it broke"}, "flags": []}
            *parents, last = place.split(".")
            inner = record
            for key in parents:
                inner[key] = inner[key] if isinstance(inner.get(key), dict) else {}
                inner = inner[key]
            inner[last] = value
        with contextlib.suppress(ValueError):  # a record that is refused for its cell
            record["cell_id"] = cell_id(Cell.model_validate(record["cell"]), record["code_version"])
        home = folder / "run" / "cells" / f"cell-{number}"
        home.mkdir(parents=True)
        (home / "attempt-1.json").write_text(json.dumps(record), encoding="utf-8")


def on_records(places: tuple[str, ...], text: str, command: tuple[str, ...], folder: Path) -> list[str]:
    """A command on records that hold a text in some places."""
    write_run(folder, dict.fromkeys(places, text))
    return list(command)


def option(arguments: tuple[str, ...], text: str, folder: Path) -> list[str]:
    """A text as the value of an option, on plain records."""
    write_run(folder, {})
    return [*arguments, text]


def cases() -> Iterator[Case]:
    """Yield texts x commands with the text in every place that takes it, texts x places, texts x options."""
    names = list(COMMANDS)
    free = tuple(place for place in PLACES if place not in ("started_at", "code_version", "failure.message"))
    for number, (name, text) in enumerate(TEXTS.items()):
        for command, arguments in COMMANDS.items():
            arrange = partial(on_records, free, text, tuple(arguments))
            refused = 3 if command == "check" else 2
            yield Case(f"records-{name}-{command}", arrange, ANSWERS.get(command, ()), refused)
        for place in PLACES:
            command = names[(number + len(place)) % len(names)]
            arrange = partial(on_records, (place,), text, tuple(COMMANDS[command]))
            refused = 3 if command == "check" else 2
            yield Case(f"record-{name}-{place}-{command}", arrange, ANSWERS.get(command, ()), refused)
        for what, arguments in OPTIONS.items():
            value = text.replace("\0", "")[:20_000]
            if value.startswith("-") or (what == "command" and not value):
                continue
            refused = 3 if arguments[:1] == ["check"] else 2
            answers = ANSWERS.get(arguments[0], ()) if arguments else ()
            yield Case(f"option-{what}-{name}", partial(option, tuple(arguments), value), answers, refused)
    for encoding in ("ascii", "latin-1", "cp1252", "utf-16"):
        for command, arguments in COMMANDS.items():
            arrange = partial(on_records, ("dataset.name", "cell.method"), "名前 → ✓", tuple(arguments))
            refused = 3 if command == "check" else 2
            yield Case(f"encoding-{encoding}-{command}", arrange, ANSWERS.get(command, ()), refused, encoding)
        yield Case(f"encoding-{encoding}-error", lambda _folder: ["report", "名前"], encoding=encoding)
        yield Case(f"encoding-{encoding}-list", lambda _folder: ["list", "presets"], encoding=encoding)
