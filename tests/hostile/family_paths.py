"""Paths: names that leave the folder, links, FIFOs, devices, and destinations that hold something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hostile.cases import Case
from hostile.family_matrices import PLAIN, changed, matrix
from hostile.family_texts import write_run

NAMES = {
    "up": "../escaped",
    "far-up": "../../../../../../../../tmp/escaped",
    "absolute": "/tmp/escaped",
    "inner": "a/../../escaped",
    "backslash": "..\\escaped",
    "dot": ".",
    "dots": "..",
    "hidden": ".ssh",
    "option": "-rf",
    "home": "~/escaped",
    "nobody": "~nobody-of-that-name/escaped",
    "long": "x" * 300,
    "long-bytes": "字" * 90,
    "slash": "/",
    "space": " ",
    "newline": "a\nb",
}
NO_NAME = r"a name (cannot|has at most)|cannot hold the character"
NAME_PLACES = ("name", "datasets.0.name", "methods.0.name", "encoders.0.text.source", "datasets.0.path")
ODD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "loop": lambda path: path.symlink_to(path.name),
    "two-loops": lambda path: (path.symlink_to("other"), (path.parent / "other").symlink_to(path.name)),
    "fifo": os.mkfifo,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "random": lambda path: path.symlink_to("/dev/urandom"),
    "folder": Path.mkdir,
    "file": lambda path: path.write_bytes(b"\x00\xff"),
    "empty": Path.touch,
    "below-a-file": lambda path: path.write_bytes(b""),
    "dangling": lambda path: path.symlink_to("nowhere/at/all"),
    "proc": lambda path: path.symlink_to("/proc/self/environ"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "closed": lambda path: path.write_text("[" * 200 + "]" * 200),
    "digits": lambda path: path.write_text('{"format": "tpme-baseline", "schema_version": ' + "9" * 5000 + "}"),
    "surrogate": lambda path: path.write_text('{"format": "\\ud800"}'),
    "huge": lambda path: path.write_bytes(b" " * (65 << 20)),
}
"""What stands at a path where a command expects something else."""
USES: dict[str, list[str]] = {
    "matrix": ["plan", "ODD"],
    "runs": ["report", "ODD", "--out", "out"],
    "choose": ["choose", "ODD"],
    "compare": ["compare", "run", "ODD"],
    "export": ["export", "ODD", "--out", "out.csv"],
    "baseline": ["check", "run", "--baseline", "ODD"],
    "new-baseline": ["baseline", "run", "--out", "ODD", "--replace"],
    "frame": ["report", "run", "--formats", "csv", "--frame", "ODD"],
    "report-out": ["report", "run", "--formats", "csv", "--out", "ODD"],
    "export-out": ["export", "run", "--out", "ODD"],
    "profile": ["plan", "demo", "--device-profile", "ODD"],
    "methods-path": ["list", "presets-of-methods", "--methods-path", "ODD"],
    "methods": ["list", "methods", "lora", "--methods-path", "ODD"],
    "store": ["run", "matrix.toml", "--dry-run", "--device", "cpu", "--store", "ODD"],
    "run-out": ["run", "matrix.toml", "--dry-run", "--device", "cpu", "--out", "ODD"],
    "prepare-source": ["prepare", "iisan", "ODD", "data"],
    "prepare-table": ["prepare", "tables", "data", "--interactions", "ODD", "--items", "ODD"],
    "prepare-destination": ["prepare", "synthetic", "ODD", "--users", "40", "--items", "40", "--workers", "1"],
    "prepare-force": ["prepare", "synthetic", "ODD", "--users", "40", "--items", "40", "--workers", "1", "--force"],
    "cells-file": ["report", "run", "--out", "out", "--formats", "csv"],
}
PLACED = {"cells-file": "run/cells.json"}
"""Where the odd thing stands, if not at ``odd``."""


def named(place: str, name: str, folder: Path) -> list[str]:
    """A matrix with a name that could become a path."""
    return ["run", matrix(folder, changed(place, name)), "--dry-run", "--device", "cpu"]


def really_named(name: str, folder: Path) -> list[str]:
    """A matrix that would run, with a name that must not become a path; nothing is to run in it."""
    raw = changed("name", name) | {"methods": [{"name": "no-such-method"}]}
    return ["run", matrix(folder, raw), "--device", "cpu"]


def used(use: str, odd: str, folder: Path) -> list[str]:
    """A command on a path where something odd stands."""
    write_run(folder, {})
    matrix(folder, PLAIN)
    place = folder / PLACED.get(use, "odd")
    ODD[odd](place)
    named = "odd/below" if odd == "below-a-file" else "odd"
    return [named if argument == "ODD" else argument for argument in USES[use]]


def destination(what: str, folder: Path) -> list[str]:
    """``prepare --force`` on a folder that holds more than prepare wrote."""
    home = folder / "data"
    home.mkdir()
    (home / "dataset.json").write_text(json.dumps({"of": "another program"}))
    if what == "thesis":
        (home / "thesis.tex").write_text("years of work")
    elif what == "link":
        (home / "items.txt").symlink_to("/etc/passwd")
    elif what == "folder":
        (home / "images.npy").mkdir()
    elif what == "workspace-link":
        (folder / "mine").mkdir()
        (folder / "mine" / "thesis.tex").write_text("years of work")
        (folder / ".data.preparing").symlink_to("mine")
        (home / "dataset.json").unlink()
    elif what == "lock-link":
        (folder / ".data.preparing").mkdir()
        (folder / "mine").write_text("years of work")
        (folder / ".data.preparing" / "lock").symlink_to("../mine")
        (home / "dataset.json").unlink()
    return ["prepare", "synthetic", "data", "--users", "40", "--items", "40", "--workers", "1", "--force"]


def locked(kind: str, folder: Path) -> list[str]:
    """A run folder whose lock is something else; the only row is refused before it runs."""
    (folder / "runs" / "small").mkdir(parents=True)
    lock = folder / "runs" / "small" / ".lock"
    if kind == "folder":
        lock.mkdir()
    else:
        (folder / "mine").write_text("years of work")
        lock.symlink_to("../../mine" if kind == "link" else "nowhere")
    return ["run", matrix(folder, changed("training.max_steps_per_epoch", 1) | {"name": "small"}), "--device", "cpu"]


NUMBERS: dict[str, list[str]] = {
    "users": ["prepare", "synthetic", "data", "--users"],
    "items": ["prepare", "synthetic", "data", "--items"],
    "seed": ["prepare", "synthetic", "data", "--users", "40", "--items", "40", "--workers", "1", "--seed"],
    "image-size": ["prepare", "synthetic", "data", "--users", "40", "--items", "40", "--image-size"],
    "length": ["prepare", "synthetic", "data", "--users", "40", "--items", "40", "--workers", "1", "--max-seq-len"],
    "workers": ["prepare", "synthetic", "data", "--users", "40", "--items", "40", "--workers"],
    "report-workers": ["report", "run", "--formats", "csv", "--workers"],
    "plan-users": ["plan", "matrix.toml", "--users"],
    "plan-items": ["plan", "matrix.toml", "--items"],
    "time-limit": ["run", "matrix.toml", "--dry-run", "--device", "cpu", "--time-limit"],
    "weights": ["report", "run", "--formats", "csv", "--weights"],
    "memory": ["choose", "run", "--max-memory"],
    "epoch-time": ["choose", "run", "--max-epoch-time"],
    "recall": ["choose", "run", "--min-recall10"],
    "threshold": ["check", "run", "--baseline", "run", "--time-threshold"],
}
VALUES = ("10" * 6, str(2**70), "9" * 5000, "nan", "inf", "1e400", "true", "0x10", "٣", "", " ", "1_000", "-0", "1e3")


def numbered(arguments: tuple[str, ...], value: str, folder: Path) -> list[str]:
    """An option that takes a number, with something else, or with a number beyond reason."""
    write_run(folder, {})
    matrix(folder, PLAIN)
    return [*arguments[:-1], f"{arguments[-1]}={value}"]


def cases() -> Iterator[Case]:
    """Yield names x places, odd things x uses, destinations, locks, and numbers x options."""
    for name, text in NAMES.items():
        yield Case(f"path-run-{name}", partial(really_named, text), says=NO_NAME)
        for place in NAME_PLACES:
            says = NO_NAME if place in ("name", "datasets.0.name") else None
            yield Case(f"path-{name}-{place}", partial(named, place, text), says=says)
    for use in USES:
        for odd in ODD:
            if (use, odd) == ("store", "proc"):  # a store may be a link, and nothing can be written there
                continue
            refused = 3 if use == "baseline" else 2
            answers = (1, 2) if use == "baseline" else (1,) if use in ("choose", "matrix", "profile") else ()
            yield Case(f"odd-{use}-{odd}", partial(used, use, odd), answers, refused)
    for what in ("thesis", "link", "folder", "workspace-link", "lock-link", "manifest-alone"):
        yield Case(f"destination-{what}", partial(destination, what))
    for kind in ("link", "dangling", "folder"):
        yield Case(f"lock-{kind}", partial(locked, kind))
    for what, arguments in NUMBERS.items():
        for value in VALUES:
            if (what, value) == ("image-size", "1_000"):  # a number, and minutes of drawing
                continue
            refused = 3 if what == "threshold" else 2
            answers = (1, 2) if what == "threshold" else (1,)
            yield Case(f"option-{what}-{value[:12]!r}", partial(numbered, tuple(arguments), value), answers, refused)
