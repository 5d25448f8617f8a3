"""Shared by the file sources: numbered lines and rows, checked items, and the handling of bad input."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tpme.bench.errors import UserError
from tpme.bench.parsing import open_regular
from tpme.bench.task.sources.raw import Picture

LONGEST_LINE = 16 * 2**20
"""In bytes; a longer one is no line of a table."""


class InputErrors:
    """Raises a UserError for bad input or, with ``skip_bad``, counts it by reason."""

    def __init__(self, *, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.skipped: Counter[str] = Counter()

    def report(self, reason: str, message: str) -> None:
        """Refuse or count one problem: ``reason`` is its kind, ``message`` says where and what."""
        if not self.skip_bad:
            raise UserError(f"{message}; correct it, or skip bad input with --skip-bad")
        self.skipped[reason] += 1


class SourceItems:
    """The items of a source, checked one by one."""

    def __init__(self, errors: InputErrors) -> None:
        self.items: list[str] = []
        self.titles: list[str] = []
        self._errors = errors
        self._where: list[str] = []
        self._position: dict[str, int] = {}
        self._refused: set[str] = set()

    def add(self, item: str, title: str | None, where: str) -> None:
        """Check and add one item; ``title`` is ``None`` in a data set without text. ``where`` names file and line."""
        if item in self._position or item in self._refused:
            self._errors.report("duplicate item", f"{where}: item '{item}' occurs twice")
        elif fault := bad_name(item, "item"):
            self._errors.report(fault, f"{where}: {fault}")
        elif title is not None and not title.strip():
            self._refused.add(item)
            self._errors.report("empty title", f"{where}: item '{item}' has an empty title")
        else:
            self._position[item] = len(self.items)
            self.items.append(item)
            self.titles.append(title or "")
            self._where.append(where)

    def pictures(
        self, by_name: Mapping[str, Picture], images: Path, paths: Mapping[str, str] | None = None
    ) -> list[Picture]:
        """The picture of every item. Items without one are reported and removed. ``paths``: what their rows name."""
        for item, where in zip(self.items, self._where, strict=True):
            if item not in by_name:
                self._refused.add(item)
                named = f" '{paths[item]}'" if paths else ""
                self._errors.report("missing image", f"{where}: item '{item}' has no image{named} in {images}")
        kept = [i for i, item in enumerate(self.items) if item in by_name]
        self.items, self.titles = [self.items[i] for i in kept], [self.titles[i] for i in kept]
        self._where = [self._where[i] for i in kept]
        self._position = {item: i for i, item in enumerate(self.items)}
        return [by_name[item] for item in self.items]

    def position(self, item: str, where: str) -> int | None:
        """Index in ``items`` of an interaction's item; ``None`` if it was skipped."""
        position = self._position.get(item)
        if position is None and item in self._refused:
            self._errors.skipped["interaction with a skipped item"] += 1
        elif position is None:
            self._errors.report("unknown item", f"{where}: item '{item}' is not among the items")
        return position


def bad_name(name: str, kind: str) -> str | None:
    """The problem with an item's or user's name, if any. The prepared data keep one name a line: no line breaks."""
    if not name.strip():
        return f"empty {kind} id"
    return f"line break in {kind} id" if "\n" in name else None


def as_history(positions: list[int]) -> NDArray[np.int32]:
    """One user's history, as positions in the list of items."""
    return np.array(positions, np.int32)


def decoded_lines(path: Path, errors: InputErrors) -> Iterator[tuple[int, str]]:
    """Yield number (from 1) and text of every line, with its line end.

    Raises:
        UserError: the file cannot be opened, or a line is not UTF-8 or too long.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE / 2**20:g} MiB")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                errors.report("not UTF-8", f"{path}, line {number}: not UTF-8 ({byte})")
                continue
            yield number, text


def csv_rows(path: Path, errors: InputErrors, delimiter: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Yield location (file and line) and fields of every row of a CSV file, header included; skips empty lines."""
    first = last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, text in decoded_lines(path, errors):
            last = number
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        first = last + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            errors.report("malformed row", f"{path}, line {first}: not CSV ({error})")
            continue
        if row:
            yield f"{path}, line {first}", row
