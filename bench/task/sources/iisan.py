"""Reads the release format of IISAN's Amazon data: a folder with ``items.tsv``, ``users.tsv`` and images.

``items.tsv``: item TAB title, one a line. ``users.tsv``: user TAB items, separated by single spaces, oldest first.
Images are in a folder or a zip archive and are named by item: ``B0098MLBAO.jpg``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.sources.pictures import find_pictures
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.reading import InputErrors, SourceItems, as_history, bad_name, decoded_lines
from tpme.bench.text import visible


def read_iisan(
    folder: Path,
    *,
    images: Path | None = None,
    modalities: tuple[Modality, ...] | None = None,
    skip_bad: bool = False,
) -> RawData:
    """Read and check a folder in the release format.

    Args:
        folder: holds ``items.tsv`` and ``users.tsv``.
        images: folder or zip archive; by default ``images`` or ``images.zip`` in ``folder``, if present.
        modalities: modalities to use; by default text, and image if there are images. Without text, the title column
            may be empty or absent.
        skip_bad: skip and count bad lines instead of stopping at the first.

    Raises:
        UserError: with file and line of the first error.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    images = images or next((folder / name for name in ("images", "images.zip") if (folder / name).exists()), None)
    chosen: tuple[Modality, ...] = modalities or (("text",) if images is None else ("text", "image"))
    errors = InputErrors(skip_bad=skip_bad)
    catalogue = _read_items(folder / "items.tsv", errors, with_titles="text" in chosen)
    pictures = None
    if "image" in chosen:
        if images is None:
            raise UserError(f"{folder}: contains neither 'images' nor 'images.zip'; pass their location with --images")
        pictures = catalogue.pictures(find_pictures(images, errors), images)
    users = _read_users(folder / "users.tsv", catalogue, errors)
    return RawData(
        name=visible(folder.resolve().name),
        items=catalogue.items,
        titles=catalogue.titles if "text" in chosen else None,
        pictures=pictures,
        users=list(users),
        histories=[as_history(positions) for positions in users.values()],
        skipped=dict(errors.skipped),
        source=f"iisan: {visible(folder.resolve().name)}",
    )


def _rows(path: Path, errors: InputErrors) -> Iterator[tuple[str, list[str]]]:
    """Location and columns of every line that is not empty."""
    for number, line in decoded_lines(path, errors):
        if line.strip():
            yield f"{path}, line {number}", line.rstrip("\r\n").split("\t")


def _read_items(path: Path, errors: InputErrors, *, with_titles: bool) -> SourceItems:
    catalogue = SourceItems(errors)
    for where, columns in _rows(path, errors):
        if len(columns) == 2:
            catalogue.add(columns[0], columns[1] if with_titles else None, where)
        elif len(columns) == 1 and not with_titles:
            catalogue.add(columns[0], None, where)
        else:
            errors.report("wrong column count", f"{where}: {len(columns)} columns; expected item TAB title")
    return catalogue


def _read_users(path: Path, catalogue: SourceItems, errors: InputErrors) -> dict[str, list[int]]:
    users: dict[str, list[int]] = {}
    for where, columns in _rows(path, errors):
        if len(columns) != 2:
            errors.report("wrong column count", f"{where}: {len(columns)} columns; expected user TAB items")
            continue
        user = columns[0]
        if fault := bad_name(user, "user"):
            errors.report(fault, f"{where}: {fault}")
        elif user in users:
            errors.report("duplicate user", f"{where}: user '{user}' occurs twice")
        else:
            positions = (catalogue.position(item, where) for item in columns[1].split(" ") if item)
            users[user] = [position for position in positions if position is not None]
    return users
