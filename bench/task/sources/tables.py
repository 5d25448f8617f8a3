"""Reads a data set from two CSV files and a folder of images.

Interactions: one row each with a user, an item and a number that orders them in time. Items: one row each with an
item and its title. Both files have a header; column names can be chosen, other columns are ignored. Images are in a
folder or a zip archive and are named by item.

MicroLens-100K, as its authors publish it, needs no conversion::

    tpme prepare tables --interactions MicroLens-100k_pairs.csv --items MicroLens-100k_title_en.csv \\
        --images MicroLens-100k_covers DEST

where the first file has the columns ``user,item,timestamp``, the second ``item,title``, and the folder holds
``1.jpg``, ``2.jpg`` and so on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from tpme.bench.errors import UserError
from tpme.bench.record import Frozen, Modality
from tpme.bench.task.sources.pictures import find_pictures
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.reading import InputErrors, SourceItems, as_history, bad_name, csv_rows

Event = tuple[int | float, int]
"""Time, and the item's position in the list of items."""


class Columns(Frozen):
    """Names of the columns in the headers."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    title: str = "title"


def read_tables(
    interactions: Path,
    items: Path,
    *,
    images: Path | None = None,
    modalities: tuple[Modality, ...] | None = None,
    columns: Columns | None = None,
    skip_bad: bool = False,
) -> RawData:
    """Read and check the two tables.

    A user's interactions are ordered by timestamp, those with equal timestamps by their order in the file. Users are
    in the order of their first row.

    Args:
        interactions: CSV with user, item and timestamp.
        items: CSV with item and title; without text, the title is not needed.
        images: folder or zip archive of images named by item.
        modalities: modalities to use; by default text, and image if ``images`` is given.
        columns: column names in both headers.
        skip_bad: skip and count bad rows instead of stopping at the first.

    Raises:
        UserError: with file and line of the first error.
    """
    chosen: tuple[Modality, ...] = modalities or (("text",) if images is None else ("text", "image"))
    columns = columns or Columns()
    errors = InputErrors(skip_bad=skip_bad)
    catalogue = _read_items(items, columns, errors, with_titles="text" in chosen)
    pictures = None
    if "image" in chosen:
        if images is None:
            raise UserError("the image modality needs --images, a folder or zip archive of images named by item")
        pictures = catalogue.pictures(find_pictures(images, errors), images)
    users = _read_interactions(interactions, columns, catalogue, errors)
    return RawData(
        name=interactions.stem,
        items=catalogue.items,
        titles=catalogue.titles if "text" in chosen else None,
        pictures=pictures,
        users=list(users),
        histories=[as_history([position for _, position in _in_time_order(events)]) for events in users.values()],
        skipped=dict(errors.skipped),
        source=f"tables: {interactions.name}, {items.name}",
    )


def _in_time_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event[0])


def _read_items(path: Path, columns: Columns, errors: InputErrors, *, with_titles: bool) -> SourceItems:
    catalogue = SourceItems(errors)
    wanted = {"item": columns.item, "title": columns.title} if with_titles else {"item": columns.item}
    for where, fields in _rows(path, wanted, errors):
        catalogue.add(fields[0], fields[1] if with_titles else None, where)
    return catalogue


def _read_interactions(
    path: Path, columns: Columns, catalogue: SourceItems, errors: InputErrors
) -> dict[str, list[Event]]:
    users: dict[str, list[Event]] = {}
    wanted = {"user": columns.user, "item": columns.item, "time": columns.timestamp}
    for where, (user, item, timestamp) in _rows(path, wanted, errors):
        time = _as_time(timestamp)
        if fault := bad_name(user, "user"):
            errors.report(fault, f"{where}: {fault}")
        elif time is None:
            errors.report("bad timestamp", f"{where}: timestamp '{timestamp}' is not a finite number")
        elif (position := catalogue.position(item, where)) is not None:
            users.setdefault(user, []).append((time, position))
    return users


def _as_time(text: str) -> int | float | None:
    """Parse a finite number, integers exactly (a float cannot hold nanoseconds); ``None`` for anything else."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _rows(path: Path, wanted: dict[str, str], errors: InputErrors) -> Iterator[tuple[str, list[str]]]:
    """Location and requested fields of every row below the header. ``wanted``: option name -> column name."""
    rows = csv_rows(path, errors)
    _, header = next(rows, ("", []))
    header = [name.strip() for name in header]
    for option, name in wanted.items():
        if name not in header:
            raise UserError(
                f"{path}, line 1: no column '{name}' in the header ({', '.join(header) or 'empty file'}); "
                f"choose one with --{option}-column"
            )
    index = [header.index(name) for name in wanted.values()]
    for where, row in rows:
        if len(row) != len(header):
            errors.report("wrong column count", f"{where}: {len(row)} columns; the header has {len(header)}")
        else:
            yield where, [row[i] for i in index]
