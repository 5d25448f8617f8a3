"""Reads a data set from two tables and images.

Interactions: one row each with a user, an item and a number that orders them in time. Items: one row each with an
item and its title. Column names can be chosen; other columns are ignored. Images are in a folder or a zip archive,
named by item or by a column of paths.

MicroLens, as its authors publish it, needs no conversion::

    tpme prepare tables DEST --interactions MicroLens-50k_pairs.csv --items MicroLens-50k_titles.csv \\
        --items-header item,title --images MicroLens-50k_covers

where the first file has the columns ``user,item,timestamp``, the second has no header, and the folder holds
``1.jpg``, ``2.jpg`` and so on.
"""

from __future__ import annotations

import math
from pathlib import Path

from tpme.bench.errors import UserError
from tpme.bench.record import Frozen, Modality
from tpme.bench.task.sources.pictures import find_pictures, pictures_at
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.reading import InputErrors, SourceItems, as_history, bad_name
from tpme.bench.task.sources.table_files import TableFile
from tpme.bench.text import visible

Event = tuple[int | float, int]
"""Time, and the item's position in the list of items."""


class Columns(Frozen):
    """Names of the columns in the headers."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    title: str = "title"
    image: str | None = None
    """Paths of images; ``None``: images are named by item."""


def read_tables(
    interactions: TableFile,
    items: TableFile,
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
        interactions: table with user, item and timestamp.
        items: table with item and title; without text, the title is not needed.
        images: folder or zip archive of images; with a column of paths by default the folder of ``items``.
        modalities: modalities to use; by default text, and image if there are images.
        columns: column names in both tables.
        skip_bad: skip and count bad rows instead of stopping at the first.

    Raises:
        UserError: with file and line of the first error.
    """
    columns = columns or Columns()
    if columns.image is not None and images is None:
        images = items.path.parent
    chosen: tuple[Modality, ...] = modalities or (("text",) if images is None else ("text", "image"))
    errors = InputErrors(skip_bad=skip_bad)
    catalogue, paths = _read_items(items, columns, errors, chosen)
    pictures = None
    if "image" in chosen:
        if images is None:
            raise UserError("the image modality needs --images, a folder or zip archive of images named by item")
        found = find_pictures(images, errors) if columns.image is None else pictures_at(paths, images, errors)
        pictures = catalogue.pictures(found, images, paths)
    users = _read_interactions(interactions, columns, catalogue, errors)
    return RawData(
        name=visible(interactions.path.stem),
        items=catalogue.items,
        titles=catalogue.titles if "text" in chosen else None,
        pictures=pictures,
        users=list(users),
        histories=[as_history([position for _, position in _in_time_order(events)]) for events in users.values()],
        skipped=dict(errors.skipped),
        source=f"tables: {visible(interactions.path.name)}, {visible(items.path.name)}",
    )


def _in_time_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event[0])


def _read_items(
    table: TableFile, columns: Columns, errors: InputErrors, modalities: tuple[Modality, ...]
) -> tuple[SourceItems, dict[str, str]]:
    """The items, and the path of each one's image where a column names them."""
    catalogue = SourceItems(errors)
    paths: dict[str, str] = {}
    wanted = {"item": columns.item}
    if "text" in modalities:
        wanted["title"] = columns.title
    if "image" in modalities and columns.image is not None:
        wanted["image"] = columns.image
    for where, fields in table.rows(wanted, errors):
        row = dict(zip(wanted, fields, strict=True))
        catalogue.add(row["item"], row.get("title"), where)
        if "image" in row:
            paths.setdefault(row["item"], row["image"])
    return catalogue, paths


def _read_interactions(
    table: TableFile, columns: Columns, catalogue: SourceItems, errors: InputErrors
) -> dict[str, list[Event]]:
    users: dict[str, list[Event]] = {}
    wanted = {"user": columns.user, "item": columns.item, "time": columns.timestamp}
    for where, (user, item, timestamp) in table.rows(wanted, errors):
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
