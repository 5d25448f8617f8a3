"""Records with impossible values, and files beside records that are not what was recorded."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hostile.cases import Case
from hostile.family_texts import ANSWERS, COMMANDS, RESULTS, write_run

from tpme.bench.record import Cell, cell_id

MISSING = object()
READING = {"value": -1.0, "source": "clock", "valid": True, "reason": None}
VALUES: dict[str, Any] = {
    "wall_s": -1.0,
    "attempt": "1",
    "attempt ": True,
    "attempt  ": 10**30,
    "warmup_epochs": 10**9,
    "best_epoch": 0,
    "time_limit_s": "3600",
    "schema_version": 2.5,
    "status": ["ok"],
    "started_at": "1970",
    "started_at ": "99999-01-01T00:00:00",
    "started_at  ": 7,
    "epoch_time_s": READING,
    "epoch_time_s.value": "0.5",
    "epoch_time_s.value ": 1e308,
    "epoch_time_s.value  ": 0.0,
    "all_in_s": READING,
    "cell.seed": 2**70,
    "cell.seed ": "12345",
    "cell.modalities": [],
    "cell.training.epochs": 10**12,
    "cell.lr.text": -1,
    "cell.options.deep": json.loads("[" * 50 + "]" * 50),
    "dataset.users": -5,
    "dataset.items": 0,
    "dataset.image_size": 10**18,
    "parameters": {"trainable": -1, "trainable_max": 0, "total": 0, "by_group": {}, "stored_bytes": 0},
    "counters": {"pass_s": READING, "valid_recall_10": READING},
    "counters ": {f"counter {number}": READING for number in range(5000)},
    "metrics": {"recall": {"value": READING | {"value": 2.0}, "higher_is_better": True}},
    "phases": [],
    "epochs": [{"index": 1, "train_s": -1, "steps": 1, "loss": 1.0, "valid_recall_10": 2, "valid_ndcg_10": 0}],
    "files": {"ranks": "../../../etc/passwd", "samples": "/dev/zero"},
    "files ": {"ranks": "/proc/self/mem"},
    "files  ": {"ranks": ".", "samples": ".."},
    "digests": {"ranks": "0" * 64},
    "flags": [{"code": "x" * 10**5, "message": "y" * 10**5}] * 20,
    "cell_id": "000000000000",
    "environment": {"python": 3},
}
"""Place -> value; spaces behind a place tell its values apart."""


def valued(place: str, value: Any, command: tuple[str, ...], folder: Path) -> list[str]:
    """A command on records with a value in one place; their ids fit, save where the id is the value."""
    write_run(folder, {} if place == "cell_id" else {place: value})
    for path in (folder / "run").rglob("attempt-1.json") if place == "cell_id" else ():
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {place: value}), encoding="utf-8")
    return list(command)


def arrays(**changes: Any) -> Callable[[Path], None]:
    """Other arrays in the file; ``MISSING`` leaves one out."""

    def change(path: Path) -> None:
        with np.load(path) as file:
            whole = dict(file)
        found = {name: value(whole[name]) if callable(value) else value for name, value in changes.items()}
        np.savez(path, **{name: value for name, value in (whole | found).items() if value is not MISSING})

    return change


def replaced(content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return change


def odd(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def header(text: str, data: bytes = b"") -> bytes:
    """An ``.npz`` whose ranks have this header."""
    raw = text.ljust(117).encode() + b"\n"
    return zipped(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data)


def zipped(data: bytes, method: int = zipfile.ZIP_DEFLATED, declared: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("rank.npy", data)
    content = buffer.getvalue()
    if declared is None:
        return content
    place, short = content.index(b"PK\x01\x02"), struct.pack("<I", declared)
    return content[:22] + short + content[26 : place + 24] + short + content[place + 28 :]


RANKS: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "fifo": odd(os.mkfifo),
    "zero": odd(lambda path: path.symlink_to("/dev/zero")),
    "folder": odd(Path.mkdir),
    "loop": odd(lambda path: path.symlink_to(path.name)),
    "link": odd(lambda path: path.symlink_to("/etc/passwd")),
    "no ranks": arrays(rank=MISSING),
    "float ranks": arrays(rank=lambda rank: rank + 0.5),
    "NaN ranks": arrays(rank=lambda rank: rank * np.nan),
    "negative ranks": arrays(rank=lambda rank: -rank),
    "ranks of 0": arrays(rank=lambda rank: rank * 0),
    "ranks of 2^62": arrays(rank=lambda rank: rank.astype(np.int64) + 2**62),
    "ranks in words": arrays(rank=lambda rank: rank.astype(str)),
    "true ranks": arrays(rank=lambda rank: rank > 0),
    "complex ranks": arrays(rank=lambda rank: rank * 1j),
    "one rank": arrays(rank=lambda rank: rank[:1]),
    "no rank": arrays(rank=lambda rank: rank[:0]),
    "ranks in two dimensions": arrays(rank=lambda rank: rank[None]),
    "targets beyond the catalogue": arrays(target=lambda target: target + 10**6),
    "history in words": arrays(in_history=lambda history: history.astype(str)),
    "pickled ranks": replaced(
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n(S'x'\ntR.")
    ),
    "10^18 ranks": replaced(header(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({10**17},), }}")),
    "header of code": replaced(header("__import__('os').system('touch ran')")),
    "bomb": replaced(zipped(bytes(2**26))),
    "bomb that declares little": replaced(zipped(bytes(2**26), declared=1000)),
    "LZMA bomb": replaced(zipped(bytes(2**26), zipfile.ZIP_LZMA, declared=1000)),
    "declares 4 GB": replaced(zipped(b"x", declared=2**32 - 2)),
}
SAMPLES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "fifo": odd(os.mkfifo),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "unequal steps": arrays(step_s=lambda step: np.append(step, 1.0)),
    "unequal samples": arrays(sample_bytes=lambda sample: sample[:0]),
    "negative steps": arrays(step_s=lambda step: -1.0 - step),
    "endless steps": arrays(step_s=lambda step: step + np.inf),
    "NaN times": arrays(sample_t_s=lambda times: times * np.nan),
    "negative memory": arrays(sample_bytes=lambda sample: -1e30 - sample),
    "endless memory": arrays(sample_bytes=lambda sample: sample + np.inf),
    "steps of other epochs": arrays(step_epoch=lambda epoch: epoch.astype(np.int64) - 2**40),
    "epochs in words": arrays(step_epoch=lambda epoch: epoch.astype(str)),
}
HARMLESS = ("history in words", "negative memory", "endless memory", "steps of other epochs", "epochs in words")


def beside(name: str, spoil: Callable[[Path], object], command: tuple[str, ...], folder: Path) -> list[str]:
    """A command on a run whose second cell has a spoilt file beside its record."""
    write_run(folder, {})
    shutil.rmtree(folder / "run" / "cells" / "cell-1")  # the same cell, without any file
    home = folder / "run" / "cells" / "trained"
    shutil.copytree(min(RESULTS.glob("id-*")), home)
    record = json.loads((home / "attempt-1.json").read_text(encoding="utf-8"))
    record |= {"digests": {}, "cell_id": cell_id(Cell.model_validate(record["cell"]), record["code_version"])}
    (home / "attempt-1.json").write_text(json.dumps(record), encoding="utf-8")
    spoil(home / record["files"][name])
    return list(command)


def cases() -> Iterator[Case]:
    """Yield values x commands by turns, and what is wrong with ranks and samples x commands."""
    names = ("report", "choose", "compare", "export", "board", "check", "baseline")
    for number, (place, value) in enumerate(VALUES.items()):
        for command in (names[number % 7], names[(number + 3) % 7]):
            arrange = partial(valued, place.strip(), value, tuple(COMMANDS[command]))
            yield Case(f"value-{place}-{command}", arrange, ANSWERS.get(command, ()), 3 if command == "check" else 2)
    for file, table in (("ranks", RANKS), ("samples", SAMPLES)):
        for number, (what, spoil) in enumerate(table.items()):
            for command in sorted({"report", "check", names[number % 7]}):
                arrange = partial(beside, file, spoil, tuple(COMMANDS[command]))
                refused = 3 if command == "check" else 2
                read = what not in HARMLESS and (file == "ranks" or command in ("report", "check"))
                says = rf"attempt-1\.{file}\.npz: " if read else None
                yield Case(f"{file}-{what}-{command}", arrange, ANSWERS.get(command, ()), refused, says=says)
