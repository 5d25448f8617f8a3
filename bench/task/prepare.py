"""Turns raw data into a prepared data set: filter, number, decode, write, and publish the folder atomically.

Users with fewer than ``min_interactions`` items are dropped; of the others only the last ``max_seq_len + 3`` items are
kept. Items without a kept interaction are dropped; ids follow the source's order, from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from tpme.bench.console import PlainConsole
from tpme.bench.errors import UserError
from tpme.bench.limits import resolved
from tpme.bench.parsing import read_json
from tpme.bench.record import Modality
from tpme.bench.task.dataset import FILES, FORMAT_VERSION, Dataset, Manifest, content_digest
from tpme.bench.task.decode import decode_all, require_space
from tpme.bench.task.fingerprint import ContentDigest
from tpme.bench.task.sources.raw import Histories, RawData, offsets_of
from tpme.bench.task.workspace import publish, workspace

_CHUNK = 256
"""Images copied or hashed at a time."""
_TEXTS = 2**16
"""Names or titles written at a time."""


@dataclass(frozen=True)
class Selection:
    """The part of the raw data that is kept.

    items: positions in ``RawData.items`` of items 1, 2, ..., N. users: positions in ``RawData.users``.
    sequences, offsets: as stored in the prepared data set.
    """

    items: NDArray[np.int64]
    users: NDArray[np.int64]
    sequences: NDArray[np.int32]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """Settings of a preparation. ``image_size``: ``None`` without images. ``workers``: ``None`` for one per core."""

    max_seq_len: int
    min_interactions: int
    image_size: int | None
    workers: int | None
    skip_bad: bool


def prepare(
    raw: RawData,
    destination: Path,
    *,
    max_seq_len: int = 10,
    min_interactions: int = 5,
    image_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> Manifest:
    """Write ``raw`` as a prepared data set to the folder ``destination``.

    The data set appears as a whole or not at all. An equal one at ``destination`` is left alone. While another process
    prepares the same folder, this one prints a message and waits.

    Args:
        raw: the data of a source.
        destination: the folder to write; its parents are created.
        max_seq_len: longest input of the sequential encoder.
        min_interactions: users with fewer items are dropped; at least 3, for training, validation and test.
        image_size: height and width of the stored images in pixels; required if ``raw`` has pictures.
        workers: processes that decode images; by default one per core.
        progress: progress display.
        skip_bad: skip and count items whose image cannot be read, with their interactions.
        force: replace another data set at ``destination``.

    Raises:
        UserError: an image cannot be read, no user is left, or ``destination`` holds something else.
    """
    if min_interactions < 3:
        raise UserError(f"min_interactions is {min_interactions}; training, validation and test need 3 items per user")
    if raw.titles is None and raw.pictures is None:
        raise UserError(f"{raw.name}: neither text nor images are selected")
    if raw.pictures is not None and image_size is None:
        raise UserError(f"{raw.name}: has images; pass the size to store them at")
    settings = Settings(
        max_seq_len, min_interactions, image_size if raw.pictures is not None else None, workers, skip_bad
    )
    destination = resolved(destination)
    _holds_data(destination)
    progress = progress or Progress(console=PlainConsole(stderr=True), disable=True)
    kept = select(raw, last=max_seq_len + 3, min_interactions=min_interactions)

    def waiting() -> None:
        message = f"{destination}: another process is preparing it; waiting for it to end"
        progress.console.print(message, style="yellow", soft_wrap=True)

    with workspace(destination, waiting) as space:
        existing = _existing(destination, force=force)
        if existing is not None and not skip_bad and not _may_be_equal(existing, raw, kept, settings):
            raise _refusal(destination)
        folder = space / "dataset"
        folder.mkdir()
        manifest = _build(raw, kept, folder, settings, progress)
        if existing is None or existing.fingerprint != manifest.fingerprint:
            if existing is not None:
                raise _refusal(destination)
            _existing(destination, force=force)  # decoding takes hours: what has been put there meanwhile stays
            publish(folder, destination, replace=force)
    return manifest


def select(
    raw: RawData, *, last: int | None, min_interactions: int, dropped: NDArray[np.bool_] | None = None
) -> Selection:
    """Filter users and interactions, and number the remaining items.

    Args:
        raw: the data of a source.
        last: number of items to keep per user, from the end; ``None`` keeps all.
        min_interactions: users with fewer items are dropped.
        dropped: (items,), items to drop first, with their interactions.

    Raises:
        UserError: no user is left.
    """
    histories = Histories.of(raw.histories)
    flat, offsets = histories.items, histories.offsets
    if dropped is not None:
        good = ~dropped[flat]
        offsets = offsets_of(good)[offsets]
        flat = flat[good]
    lengths = np.diff(offsets)
    enough = lengths >= min_interactions
    if not enough.any():
        raise UserError(
            f"{raw.name}: no user has at least {min_interactions} items (maximum {lengths.max(initial=0)}, "
            f"{len(raw.users)} users), so there is nothing to prepare"
        )
    kept_lengths = lengths[enough] if last is None else np.minimum(lengths[enough], last)
    ends = offsets[1:][enough]
    bounds = np.zeros(len(flat) + 1, np.int8)  # every interaction counts: nothing here has 8 bytes of each
    bounds[ends - kept_lengths] += 1
    bounds[ends] -= 1
    flat = flat[np.cumsum(bounds[:-1], dtype=np.int8).view(bool)]
    used = np.zeros(len(raw.items), bool)
    used[flat] = True
    return Selection(
        items=np.flatnonzero(used),
        users=np.flatnonzero(enough),
        sequences=np.cumsum(used, dtype=np.int32)[flat],
        offsets=offsets_of(kept_lengths),
    )


# --- the destination ---------------------------------------------------------------------------------------


def _holds_data(destination: Path) -> bool:
    """Whether a prepared data set is there; ``False`` if nothing is. Raises UserError for anything else."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    if not (destination / "dataset.json").is_file():
        raise UserError(f"{destination}: exists and is not a prepared data set; choose another destination")
    return True


def _existing(destination: Path, *, force: bool) -> Manifest | None:
    """The data set that must not be replaced; ``None`` if the folder is free or may be replaced."""
    if not _holds_data(destination):
        return None
    if force:
        _check_own(destination)
        return None
    try:
        manifest = Dataset.open(destination).manifest
    except UserError:
        raise _refusal(destination) from None
    if content_digest(destination, manifest) != manifest.fingerprint:
        raise _refusal(destination)
    return manifest


def _check_own(folder: Path) -> None:
    """Raise UserError for a folder that holds more than a prepared data set, or whose manifest is another program's."""
    files = {entry.name for entry in folder.iterdir() if entry.is_file() and not entry.is_symlink()}
    others = {entry.name for entry in folder.iterdir()} - (files & {"dataset.json", *FILES})
    if others:
        what = f"'{min(others)}', which 'tpme prepare' does not write"
    elif not _is_manifest(folder / "dataset.json"):
        what = "a dataset.json that 'tpme prepare' did not write"
    else:
        return
    raise UserError(f"{folder}: not replaced: it holds {what}; move it away, or choose another folder")


def _is_manifest(path: Path) -> bool:
    """Whether ``prepare`` wrote the file, in any version: to read the data set is more than that."""
    try:
        manifest = read_json(path)
    except UserError:
        return False
    return isinstance(manifest, dict) and {"format_version", "fingerprint"} <= manifest.keys()


def _refusal(destination: Path) -> UserError:
    return UserError(f"{destination}: holds another data set or a damaged one; choose another folder or add --force")


def _may_be_equal(existing: Manifest, raw: RawData, kept: Selection, settings: Settings) -> bool:
    """Whether ``existing`` can equal the data set to prepare, as far as known before decoding images."""
    return (
        existing.modalities == _modalities(raw)
        and existing.max_seq_len == settings.max_seq_len
        and existing.image_size == settings.image_size
        and (existing.users, existing.items) == (len(kept.users), len(kept.items))
        and existing.interactions == len(kept.sequences)
    )


# --- the content -------------------------------------------------------------------------------------------


def _build(raw: RawData, kept: Selection, folder: Path, settings: Settings, progress: Progress) -> Manifest:
    """Write all files of the data set to ``folder``. Its fingerprint: SHA-256 of the content without the name."""
    skipped = Counter(raw.skipped)
    images = folder / "images.npy"
    if raw.pictures is not None and settings.skip_bad:
        kept = _write_good_images(raw, images, settings, progress, skipped)
    arrays: dict[str, NDArray[Any]] = {"offsets": kept.offsets, "sequences": kept.sequences}
    _write_texts(folder / "items.txt", raw.items, kept.items, end="\n")
    _write_texts(folder / "users.txt", raw.users, kept.users, end="\n")
    if raw.titles is not None:
        lengths = _write_texts(folder / "titles.bin", raw.titles, kept.items)
        arrays["title_offsets"] = np.concatenate(([0], offsets_of(lengths)))
    digest = ContentDigest(FORMAT_VERSION, settings.max_seq_len)
    for name in ("items.txt", *(["titles.bin"] if raw.titles is not None else ()), "users.txt"):
        digest.add_file(folder / name)
    if raw.pictures is not None:
        advance = _hashing(digest, images, len(kept.items), settings)
        if settings.skip_bad:
            for start in range(0, len(kept.items), _CHUNK):
                advance(min(_CHUNK, len(kept.items) - start))
        else:
            _decode(raw, kept.items, images, settings, progress, advance)
    for name, array in sorted(arrays.items()):
        np.save(folder / f"{name}.npy", array)
        digest.begin_array(name, array.dtype, array.shape)
        digest.update(array.data)
    manifest = Manifest(
        name=raw.name,
        source=raw.source or raw.name,
        synthetic=raw.synthetic,
        modalities=_modalities(raw),
        users=len(kept.users),
        items=len(kept.items),
        interactions=len(kept.sequences),
        max_seq_len=settings.max_seq_len,
        image_size=settings.image_size,
        skipped=dict(skipped),
        fingerprint=digest.hexdigest(),
    )
    (folder / "dataset.json").write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def _write_texts(path: Path, texts: Sequence[str], places: NDArray[np.int64], end: str = "") -> NDArray[np.int64]:
    """Write the texts at these places, (n,), as UTF-8, each followed by ``end``; returns their lengths in bytes."""
    lengths = np.zeros(len(places), np.int64)
    with path.open("wb") as file:
        for start in range(0, len(places), _TEXTS):
            encoded = [(texts[place] + end).encode() for place in places[start : start + _TEXTS].tolist()]
            lengths[start : start + len(encoded)] = list(map(len, encoded))
            file.write(b"".join(encoded))
    return lengths


def _hashing(digest: ContentDigest, path: Path, items: int, settings: Settings) -> Callable[[int], None]:
    """Return a function that adds the next ``count`` written images to ``digest``, while the workers decode others."""
    assert settings.image_size is not None
    size, row = settings.image_size, 1
    digest.begin_array("images", np.dtype(np.uint8), (items + 1, 3, size, size))
    digest.update(bytes(3 * size * size))  # row 0, padding

    def advance(count: int) -> None:
        nonlocal row
        digest.update(np.load(path, mmap_mode="r")[row : row + count].data)
        row += count

    return advance


def _modalities(raw: RawData) -> tuple[Modality, ...]:
    text: tuple[Modality, ...] = ("text",) if raw.titles is not None else ()
    return (*text, "image") if raw.pictures is not None else text


def _decode(
    raw: RawData,
    items: NDArray[np.int64],
    path: Path,
    settings: Settings,
    progress: Progress,
    then: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """Decode the pictures of ``items`` (n,) to rows 1..n of ``path``; returns the indices in ``items`` that failed.

    ``then`` is called like ``advance`` of ``decode_all``.
    """
    assert raw.pictures is not None
    assert settings.image_size is not None
    pictures = [raw.pictures[i] for i in items]
    task = progress.add_task("Images", total=len(pictures))

    def advance(count: int) -> None:
        progress.advance(task, count)
        then(count)

    failures = decode_all(
        pictures,
        path,
        settings.image_size,
        workers=settings.workers,
        skip_bad=settings.skip_bad,
        advance=advance,
    )
    return [index for index, _ in failures]


def _write_good_images(
    raw: RawData, path: Path, settings: Settings, progress: Progress, skipped: Counter[str]
) -> Selection:
    """Decode all images, drop items whose image is unreadable, and write the images of the remaining selection.

    Where a bad item is dropped, an older item of the same user moves into the last ``max_seq_len + 3``. So the images
    of all items of these users are decoded first.
    """
    every = select(raw, last=None, min_interactions=settings.min_interactions)
    scratch = path.with_name("decoded.npy")
    failed = every.items[_decode(raw, every.items, scratch, settings, progress)]
    dropped = np.zeros(len(raw.items), bool)
    dropped[failed] = True
    last = settings.max_seq_len + 3
    kept = select(raw, last=last, min_interactions=settings.min_interactions, dropped=dropped)
    if len(failed):
        skipped["unreadable image"] += len(failed)
        skipped["interaction with a skipped item"] += int(np.count_nonzero(dropped[Histories.of(raw.histories).items]))
    if np.array_equal(kept.items, every.items):
        scratch.rename(path)
        return kept
    decoded = np.load(scratch, mmap_mode="r")
    shape = (len(kept.items) + 1, *decoded.shape[1:])
    require_space(path.parent, int(np.prod(shape)))  # a full disk crashes writes through a memory map
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    rows = np.concatenate(([0], np.searchsorted(every.items, kept.items) + 1))
    for start in range(0, len(rows), _CHUNK):
        _remap(images, "r+")[start : start + _CHUNK] = _remap(decoded)[rows[start : start + _CHUNK]]
    scratch.unlink()
    return kept


def _remap(array: Any, mode: Literal["r", "r+"] = "r") -> NDArray[Any]:
    """Map the same file again.

    Touched pages count as memory of this process until their mapping is closed: with one mapping for all rows, memory
    would grow with the number of items.
    """
    return np.memmap(array.filename, array.dtype, mode, array.offset, array.shape)
