"""What the file sources share: lines and rows with their numbers, and one place where bad input ends."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tpme.bench.errors import UserError
from tpme.bench.task.sources.raw import Picture


class Complaints:
    """Bad input ends here: as a UserError, or counted by reason where it shall be skipped."""

    def __init__(self, *, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.skipped: Counter[str] = Counter()

    def bad(self, reason: str, message: str) -> None:
        """Refuse one thing: ``reason`` is its kind, ``message`` says where and what."""
        if not self.skip_bad:
            raise UserError(f"{message}; correct it, or leave such things out with --skip-bad")
        self.skipped[reason] += 1


class Catalogue:
    """The items of a source, checked one by one as they are read."""

    def __init__(self, complaints: Complaints) -> None:
        self.items: list[str] = []
        self.titles: list[str] = []
        self._complaints = complaints
        self._where: list[str] = []
        self._position: dict[str, int] = {}
        self._refused: set[str] = set()

    def add(self, item: str, title: str | None, where: str) -> None:
        """Take one item; ``title`` is ``None`` in a data set without text. ``where`` names file and line."""
        if item in self._position or item in self._refused:
            self._complaints.bad("duplicate item", f"{where}: item '{item}' was already there")
        elif fault := bad_name(item, "item"):
            self._complaints.bad(fault, f"{where}: {fault}")
        elif title is not None and not title.strip():
            self._refused.add(item)
            self._complaints.bad("empty title", f"{where}: item '{item}' has an empty title")
        else:
            self._position[item] = len(self.items)
            self.items.append(item)
            self.titles.append(title or "")
            self._where.append(where)

    def pictures(self, found: dict[str, Picture], images: Path) -> list[Picture]:
        """The picture of every item. Items without one are refused, and are no longer in the catalogue."""
        for item, where in zip(self.items, self._where, strict=True):
            if item not in found:
                self._refused.add(item)
                self._complaints.bad("missing image", f"{where}: item '{item}' has no image in {images}")
        kept = [i for i, item in enumerate(self.items) if item in found]
        self.items, self.titles = [self.items[i] for i in kept], [self.titles[i] for i in kept]
        self._where = [self._where[i] for i in kept]
        self._position = {item: i for i, item in enumerate(self.items)}
        return [found[item] for item in self.items]

    def position(self, item: str, where: str) -> int | None:
        """Where an interaction's item stands in ``items``; ``None`` if it was skipped."""
        position = self._position.get(item)
        if position is None and item in self._refused:
            self._complaints.skipped["interaction with a skipped item"] += 1
        elif position is None:
            self._complaints.bad("unknown item", f"{where}: item '{item}' is not among the items")
        return position


def bad_name(name: str, kind: str) -> str | None:
    """What is wrong with an item's or a user's name. Line breaks are, as the prepared data keep one name a line."""
    if not name.strip():
        return f"empty {kind} id"
    return f"line break in {kind} id" if "\n" in name else None


def as_history(positions: list[int]) -> NDArray[np.int32]:
    """One user's positions in the catalogue."""
    return np.array(positions, np.int32)


def decoded_lines(path: Path, complaints: Complaints) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line, its line end included.

    Raises:
        UserError: the file cannot be opened, or a line of it is not UTF-8.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = f"{path}, line {number}: not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1})"
                complaints.bad("not UTF-8", bad)
                continue
            yield number, text


def csv_rows(path: Path, complaints: Complaints) -> Iterator[tuple[str, list[str]]]:
    """Place (file and line) and fields of every row of a CSV file, the header too. Empty lines are passed over."""
    first = last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, text in decoded_lines(path, complaints):
            last = number
            yield text

    reader = csv.reader(lines(), strict=True)
    while True:
        first = last + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            complaints.bad("malformed row", f"{path}, line {first}: not CSV ({error})")
            continue
        if row:
            yield f"{path}, line {first}", row
