"""Every value and key in the files that commands read beside matrices: records, baselines, frames, profiles, data sets.

And prepared data whose files were changed, cut, removed or replaced by something else.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import tomli_w
from hostile.cases import Case, places, replaced
from hostile.family_matrices import PLAIN, matrix
from hostile.family_texts import ANSWERS, COMMANDS, RESULTS

from tpme.bench.record import Cell, cell_id
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate
from tpme.reports.gate.baseline import from_records, write_baseline

ODD: tuple[Any, ...] = (
    None, True, "3", -1, 0, 2.5, 1e308, -1e308, 2**63, 10**30, [], {}, ["a"], {"a": 1}, "\x1b[31m", "[/]", "=1+1",
    "a\n::error::three", "\u202eabc", "../../etc/passwd", "<script>", "x" * 100_000, "", "\ud800", "{0} %s", "$x^",
    "://a:b" * 20_000, "_TOKEN" * 20_000,
)  # fmt: skip
KEYS = (
    "\x1b[31m",
    "[/]",
    "=1+1",
    "a\n::error::three",
    "\u202ea",
    "../..",
    "<b>",
    "",
    "a" * 10_000,
    '"',
    "a,b",
    "A",
    "$",
)
RECORD = min(RESULTS.glob("lora-*"))


@cache
def made() -> tempfile.TemporaryDirectory[str]:
    """A folder with a small prepared data set and a baseline, gone when the program ends."""
    folder = tempfile.TemporaryDirectory(prefix="hostile-")
    write_baseline(from_records([RECORD]), Path(folder.name, "base.json"))
    prepare(generate(Synthetic(users=40, items=40)), Path(folder.name, "data"), image_size=8, workers=1)
    return folder


def content(name: str) -> Any:
    """The content of a file that is changed; of a record with many phases and epochs, the first ones."""
    path = RECORD / "attempt-1.json" if name == "record" else Path(made().name, name)
    raw = json.loads(path.read_text(encoding="utf-8"))
    return raw | {"phases": raw["phases"][3:5], "epochs": raw["epochs"][:2]} if name == "record" else raw


def changes(tree: Any, offset: int) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Yield other values for every place of a tree, by turns, and other keys for every table that takes any."""
    for number, place in enumerate(places(tree)[1:]):
        value = ODD[(number + offset) % len(ODD)]
        yield f"{'.'.join(map(str, place))}-{(number + offset) % len(ODD)}", partial(replaced, place=place, value=value)
    for number, place in enumerate(place for place in places(tree) if _is_open(tree, place)):
        key = KEYS[(number + offset) % len(KEYS)]
        yield (
            f"{'.'.join(map(str, place))}-key-{(number + offset) % len(KEYS)}",
            partial(_with_key, place=place, key=key),
        )


def _is_open(tree: Any, place: tuple[Any, ...]) -> bool:
    for key in place:
        tree = tree[key]
    return isinstance(tree, dict) and bool(tree)


def _with_key(tree: Any, place: tuple[Any, ...], key: str) -> Any:
    """The tree with another key in a table, with the value of the first."""
    other = copy.deepcopy(tree)
    inner = other
    for part in place:
        inner = inner[part]
    inner[key] = copy.deepcopy(next(iter(inner.values())))
    return other


def on_record(change: Callable[[Any], Any], command: tuple[str, ...], folder: Path) -> list[str]:
    """A command on a run of one record that was changed; its id fits."""
    home = folder / "run" / "cells" / "cell"
    shutil.copytree(RECORD, home)
    record = change(content("record"))
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a record that is refused for its cell
        record["cell_id"] = cell_id(Cell.model_validate(record["cell"]), record["code_version"])
    (home / "attempt-1.json").write_text(json.dumps(record), encoding="utf-8")
    return list(command)


def on_baseline(change: Callable[[Any], Any], folder: Path) -> list[str]:
    """The gate with a baseline that was changed."""
    shutil.copytree(RECORD, folder / "run" / "cells" / "cell")
    (folder / "base.json").write_text(json.dumps(change(content("base.json"))), encoding="utf-8")
    return [
        argument if argument != "run" or number == 1 else "base.json"
        for number, argument in enumerate(COMMANDS["check"])
    ]


def bomb(ranks: bytes) -> Callable[[Any], Any]:
    """A baseline whose ranks unpack to these."""
    packed = base64.b64encode(zlib.compress(ranks, 9)).decode()
    return lambda tree: replaced(tree, ("cells", 0, "quality", "ranks"), packed)


FRAME = {"format": "tpme-frame", "frames": []}
PROFILE = {
    "name": "mine", "source": "datasheet", "matmul_flop_per_s": {"fp32": 1e12}, "memory_bytes_per_s": 1e11,
    "memory_bytes": 10**10, "efficiency": 0.5, "operator_s": 1e-5, "workspace_bytes": 0,
}  # fmt: skip


def on_profile(change: Callable[[Any], Any], folder: Path) -> list[str]:
    """A plan for a device whose profile was changed."""
    raw = change(PROFILE)
    try:
        text = tomli_w.dumps(raw)
    except (TypeError, AttributeError, ValueError):  # None; a lone surrogate
        text = "name = "
    (folder / "device.toml").write_text(text, encoding="utf-8", errors="replace")
    return ["plan", matrix(folder, PLAIN), "--device-profile", "device.toml"]


def with_data(folder: Path) -> Path:
    """A matrix on a copy of the prepared data set."""
    shutil.copytree(Path(made().name, "data"), folder / "data")
    matrix(folder, PLAIN | {"datasets": [{"name": "data", "path": "data"}]})
    return folder / "data"


RUN = ("run", "matrix.toml", "--dry-run", "--device", "cpu")
USES = (
    RUN,
    ("plan", "matrix.toml"),
    ("prepare", "synthetic", "data", "--users", "40", "--items", "40", "--workers", "1"),
)


def on_manifest(change: Callable[[Any], Any], command: tuple[str, ...], folder: Path) -> list[str]:
    """A command on prepared data whose manifest was changed."""
    data = with_data(folder)
    (data / "dataset.json").write_text(json.dumps(change(content("data/dataset.json"))), encoding="utf-8")
    return list(command)


def flipped(path: Path) -> None:
    raw, facts = bytearray(path.read_bytes()), path.stat()
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


SPOILT: dict[str, Callable[[Path], object]] = {
    "flipped": flipped,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "fifo": instead(os.mkfifo),
    "zero": instead(lambda path: path.symlink_to("/dev/zero")),
    "folder": instead(Path.mkdir),
    "loop": instead(lambda path: path.symlink_to(path.name)),
    "header": lambda path: path.write_bytes(path.read_bytes().replace(b"'shape': (", b"'shape': (9" * 9, 1)),
}


def on_data(name: str, spoil: Callable[[Path], object], command: tuple[str, ...], folder: Path) -> list[str]:
    """A command on prepared data of which a file was changed."""
    spoil(with_data(folder) / name)
    return list(command)


def cases() -> Iterator[Case]:
    """Yield changed records, baselines, profiles and manifests, and spoilt files of prepared data x uses."""
    names = list(COMMANDS)
    for number, (what, change) in enumerate(changes(content("record"), 0)):
        command = names[number % len(names)]
        arrange = partial(on_record, change, tuple(COMMANDS[command]))
        yield Case(f"leaf-{what}-{command}", arrange, ANSWERS.get(command, ()), 3 if command == "check" else 2)
    for what, change in (*changes(content("base.json"), 5), ("bomb", bomb(bytes(2**31))), ("rank 11", bomb(b"\x0b"))):
        yield Case(f"baseline-{what}", partial(on_baseline, change), (1, 2), 3)
    for what, change in changes(PROFILE, 9):
        yield Case(f"profile-{what}", partial(on_profile, change), (1,))
    for turn, command in enumerate(USES):
        for what, change in changes(content("data/dataset.json"), 7 * turn):
            yield Case(f"manifest-{what}-{command[0]}", partial(on_manifest, change, command), (1,))
        for file in sorted(path.name for path in Path(made().name, "data").iterdir()):
            for what, spoil in SPOILT.items():
                if what != "header" or file.endswith(".npy"):
                    yield Case(f"data-{file}-{what}-{command[0]}", partial(on_data, file, spoil, command), (1,))
