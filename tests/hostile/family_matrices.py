"""Matrices: texts in every key, numbers of every kind in every number, and files that are no matrix."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from hostile.cases import TEXTS, Case

PLAIN: dict[str, Any] = {
    "name": "small",
    "description": "what it is for",
    "datasets": [{"name": "data", "synthetic": {"users": 40, "items": 40}, "image_size": 8}],
    "encoders": [{"text": {"source": "builtin:tiny-text"}, "image": {"source": "builtin:tiny-image"}}],
    "methods": [{"name": "popularity", "options": {}}],
    "training": {"epochs": 1},
    "lr": {"text": 1e-3},
    "axes": {"precision": ["fp32"]},
}
TEXT_PLACES = (
    "name", "description", "protocol", "seeds", "datasets.0.name", "datasets.0.path", "encoders.0.text.source",
    "encoders.0.text.revision", "methods.0.name", "training.precision", "cache_limit_bytes",
)  # fmt: skip
KEY_PLACES = ("", "datasets.0.synthetic", "encoders.0.text", "methods.0.options", "training", "lr", "lr.groups", "axes")
NUMBER_PLACES = (
    "seeds", "seeds.0", "time_limit_s", "probe_items", "cache_limit_bytes", "training.epochs", "training.dropout",
    "training.users_per_batch", "training.embedding_dim", "training.title_tokens", "training.heads", "training.blocks",
    "lr.text", "datasets.0.image_size", "datasets.0.synthetic.users", "datasets.0.synthetic.items",
    "datasets.0.synthetic.seed", "datasets.0.synthetic.continues", "datasets.0.synthetic.longest_history",
    "methods.0.cached", "methods.0.lr", "axes.epochs",
)  # fmt: skip
NUMBERS = {
    "true": True,
    "text": "3",
    "negative": -1,
    "zero": 0,
    "2^70": 2**70,
    "10^12": 10**12,
    "fraction": 2.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "table": {},
}
FILES: dict[str, bytes] = {
    "deep-lists": b"name = " + b"[" * 50_000,
    "closed-lists": b"name = " + b"[" * 300 + b"]" * 300,
    "deep-tables": b"name = " + b"{a=" * 20_000,
    "deep-key": b"a" + b".a" * 100_000 + b" = 1",
    "deep-header": b"[" + b"a." * 100_000 + b"a]",
    "digits": b"seeds = [" + b"9" * 5_000 + b"]",
    "hexadecimal": b"seeds = [0x" + b"f" * 100_000 + b"]",
    "exponent": b"time_limit_s = 1e999999999",
    "binary": bytes(range(256)),
    "utf-16": "name = 'a'".encode("utf-16"),
    "mark": b"\xef\xbb\xbfname = 'a'",
    "latin-1": "name = 'é'".encode("latin-1"),
    "escape": b'name = "\\u0000\\u001b[31m"',
    "surrogate": b'name = "\\ud800"',
    "empty": b"",
    "json": b'{"name": "a"}',
    "twice": b"name = 'a'\nname = 'b'",
    "dates": b"name = 1979-05-27T07:32:00Z\nseeds = [07:32:00]",
    "huge": b"# " + b"x" * (2 << 20),
    "many-tables": b"[[datasets]]\nname = 'a'\n" * 20_000,
    "not-closed": b'name = """' + b"a\n" * 10_000,
}


def matrix(folder: Path, raw: dict[str, Any]) -> str:
    """Write ``raw`` as a matrix file, with a broken string where TOML has no escape for it."""
    path = folder / "matrix.toml"
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    return path.name


def changed(place: str, value: Any) -> dict[str, Any]:
    """The plain matrix with another value at a dotted place."""
    raw = copy.deepcopy(PLAIN)
    *parents, last = place.split(".")
    inner: Any = raw
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, [None] if key == "seeds" else {})
    if isinstance(inner, list):
        inner[int(last)] = value
    else:
        inner[last] = [value] if last in ("axes.epochs",) else value
    return raw


def dry_run(place: str, value: Any, folder: Path) -> list[str]:
    """Check a changed matrix without running it."""
    return ["run", matrix(folder, changed(place, value)), "--dry-run", "--device", "cpu"]


def with_key(place: str, key: str, folder: Path) -> list[str]:
    """Check a matrix with another key in a table."""
    return dry_run(f"{place}.x".removeprefix("."), 1, folder) if not key else _with_key(place, key, folder)


def _with_key(place: str, key: str, folder: Path) -> list[str]:
    raw = changed(place, {}) if place == "lr.groups" else copy.deepcopy(PLAIN)
    table: Any = raw
    for part in filter(None, place.split(".")):
        table = table[int(part)] if isinstance(table, list) else table[part]
    table[key] = [1] if place == "axes" else 1
    return ["run", matrix(folder, raw), "--dry-run", "--device", "cpu"]


def read_file(content: bytes, command: str, folder: Path) -> list[str]:
    """Give a command a file that is no matrix, or none that is read."""
    (folder / "matrix.toml").write_bytes(content)
    return [command, "matrix.toml", *(["--device", "cpu", "--dry-run"] if command == "run" else [])]


def set_to(setting: str, folder: Path) -> list[str]:
    """Lay a setting over the plain matrix."""
    return ["run", matrix(folder, PLAIN), "--dry-run", "--device", "cpu", "--set", setting]


SETTINGS = {
    "deep-key": "a." * 30_000 + "a=1",
    "deep-list": "seeds=" + "[" * 20_000 + "]" * 20_000,
    "deep-table": "lr=" + "{a=" * 10_000,
    "dotted-table": "lr={" + "a." * 30_000 + "a=1}",
    "second-line": "name='a'\n[" + "a." * 30_000 + "a]",
    "digits": "seeds=" + "9" * 5_000,
    "index": "datasets." + "9" * 5_000 + ".name=a",
    "far-index": "datasets.999999999999.name=a",
    "negative-index": "datasets.-1.name=a",
    "superscript": "datasets.².name=a",
    "no-value": "training.epochs=",
    "no-key": "=1",
    "dots": "...=1",
    "into-text": "name.a.b=1",
    "list-for-text": "name=[a,b]",
    "half-list": "modalities=[text,",
    "true": "training.epochs=true",
    "quoted": "training.epochs='3'",
    "2^70": f"seeds=[{2**70}]",
    "huge": f"training.embedding_dim={10**12}",
    "surrogate": "description=a\udcffb",
    "surrogate-key": "training.\udcff=1",
    "long": "description=" + "x" * 100_000,
}


def many_cells(folder: Path) -> list[str]:
    """A matrix of 10^9 cells in a few lines."""
    axes = {name: list(range(1, 1001)) for name in ("epochs", "patience", "title_tokens")}
    return ["plan", matrix(folder, changed("axes", axes))]


def many_trials(folder: Path) -> list[str]:
    """A matrix of 10^9 cells through learning rates, seeds and data sets."""
    raw = changed("axes", {"lr": [1e-3] * 1000})
    raw |= {"seeds": list(range(1000)), "encoders": PLAIN["encoders"] * 1000}
    return ["run", matrix(folder, raw), "--dry-run", "--device", "cpu"]


def cases() -> Iterator[Case]:
    """Yield texts x places, numbers x places, files, and settings."""
    for name, text in TEXTS.items():
        for place in TEXT_PLACES:
            yield Case(f"matrix-{name}-{place}", partial(dry_run, place, text))
        place = KEY_PLACES[len(name) % len(KEY_PLACES)]
        yield Case(f"matrix-key-{name}-{place}", partial(with_key, place, text))
        yield Case(f"set-value-{name}", partial(set_to, f"description={text.replace(chr(0), '')[:100_000]}"))
        yield Case(f"set-key-{name}", partial(set_to, f"training.{text.replace(chr(0), '')[:100_000]}=1"))
        yield Case(f"matrix-file-{name}", lambda _folder, text=text: ["plan", text.replace("\0", "")[:5_000]])
    for name, number in NUMBERS.items():
        for place in NUMBER_PLACES:
            if not (name == "2^70" and place == "seeds"):
                yield Case(f"number-{name}-{place}", partial(dry_run, place, number))
    for name, content in FILES.items():
        for command in ("run", "plan"):
            yield Case(f"file-{name}-{command}", partial(read_file, content, command))
    for name, setting in SETTINGS.items():
        yield Case(f"set-{name}", partial(set_to, setting))
    yield Case("cells-axes", many_cells)
    yield Case("cells-trials", many_trials)
