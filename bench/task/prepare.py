"""From what a source read to a prepared data set: filter, number, decode, write, and let it appear all at once.

Kept are users with at least ``min_interactions`` items, and of each the last ``max_seq_len + 3``: older ones do not
exist for anyone. Items that no kept interaction uses are dropped; ids follow the source's order, from 1.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.dataset import FORMAT_VERSION, Dataset, Manifest, names_as_text
from tpme.bench.task.decode import decode_all, require_space
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.workspace import publish, workspace

if TYPE_CHECKING:
    from hashlib import _Hash

_CHUNK = 256
"""Images copied or hashed at a time."""


@dataclass(frozen=True)
class Kept:
    """What is left of the raw data.

    items: positions in ``RawData.items`` of items 1, 2, ..., N. users: positions in ``RawData.users``.
    sequences, offsets: as the prepared data set stores them.
    """

    items: NDArray[np.int64]
    users: NDArray[np.int64]
    sequences: NDArray[np.int32]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """How to prepare. ``image_size`` is ``None`` without images; ``workers`` is ``None`` for one a core."""

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

    Either the whole data set is there in the end or nothing of it. An equal one that is there already is left alone;
    while another process is preparing one there, this one waits and says so.

    Args:
        raw: what a source read.
        destination: where the folder shall appear; its parents are made.
        max_seq_len: longest input of the sequential encoder.
        min_interactions: users with fewer items are dropped; at least 3, for training, validation and test.
        image_size: height and width of the stored images in pixels; needed where ``raw`` has pictures.
        workers: processes that decode images; by default one a core.
        progress: where to show progress.
        skip_bad: leave items out whose image cannot be read, with their interactions, and count them.
        force: replace another data set at ``destination``.

    Raises:
        UserError: an image cannot be read, nothing is left, or something else stands at ``destination``.
    """
    if min_interactions < 3:
        raise UserError(f"min_interactions is {min_interactions}; training, validation and test need 3 items a user")
    if raw.titles is None and raw.pictures is None:
        raise UserError(f"{raw.name}: neither text nor images are to be used")
    if raw.pictures is not None and image_size is None:
        raise UserError(f"{raw.name}: has images; give the size to store them at")
    settings = Settings(
        max_seq_len, min_interactions, image_size if raw.pictures is not None else None, workers, skip_bad
    )
    destination = destination.expanduser().resolve()
    progress = progress or Progress(console=Console(stderr=True), disable=True)
    kept = keep(raw, last=max_seq_len + 3, min_interactions=min_interactions)

    def waiting() -> None:
        told = f"{destination}: another process is preparing it; waiting for it to end"
        progress.console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)

    with workspace(destination, waiting) as space:
        existing = _existing(destination, force=force)
        if existing is not None and not skip_bad and not _alike(existing, raw, kept, settings):
            raise _refusal(destination)
        folder = space / "dataset"
        folder.mkdir()
        manifest = _build(raw, kept, folder, settings, progress)
        if existing is None or existing.fingerprint != manifest.fingerprint:
            if existing is not None:
                raise _refusal(destination)
            publish(folder, destination, replace=force)
    return manifest


def keep(raw: RawData, *, last: int | None, min_interactions: int, dropped: NDArray[np.bool_] | None = None) -> Kept:
    """Filter and number.

    Args:
        raw: what a source read.
        last: how many items of a user to keep, from the end; ``None`` keeps all.
        min_interactions: users with fewer items are dropped.
        dropped: (items,), items to leave out beforehand, with their interactions.

    Raises:
        UserError: no user is left.
    """
    flat, user = _flattened(raw)
    if dropped is not None:
        good = ~dropped[flat]
        flat, user = flat[good], user[good]
    lengths = np.bincount(user, minlength=len(raw.users))
    enough = lengths >= min_interactions
    if not enough.any():
        raise UserError(
            f"{raw.name}: no user has {min_interactions} items or more (the longest has "
            f"{lengths.max(initial=0)} of {len(raw.users)} users), so nothing is left to prepare"
        )
    to_end = np.cumsum(lengths)[user] - np.arange(len(flat))  # 1 for a user's last item
    kept_lengths = lengths[enough] if last is None else np.minimum(lengths[enough], last)
    recent = to_end <= (len(flat) if last is None else last)
    flat = flat[enough[user] & recent]
    used = np.zeros(len(raw.items), bool)
    used[flat] = True
    return Kept(
        items=np.flatnonzero(used),
        users=np.flatnonzero(enough),
        sequences=np.cumsum(used, dtype=np.int32)[flat],
        offsets=np.concatenate(([0], np.cumsum(kept_lengths, dtype=np.int64))),
    )


def _flattened(raw: RawData) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Item and user of every interaction, user after user, oldest first: both (interactions,)."""
    lengths = np.array([len(history) for history in raw.histories], np.int64)
    nothing = np.zeros(0, np.int32)
    return np.concatenate([nothing, *raw.histories]).astype(np.int64), np.repeat(np.arange(len(lengths)), lengths)


# --- the destination ---------------------------------------------------------------------------------------


def _existing(destination: Path, *, force: bool) -> Manifest | None:
    """The data set that must not be replaced; ``None`` if the place is free or its content may go."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    if not (destination / "dataset.json").is_file():
        raise UserError(f"{destination}: exists and is no prepared data set; choose another destination")
    if force:
        return None
    try:
        return Dataset.open(destination).manifest
    except UserError:
        raise _refusal(destination) from None


def _refusal(destination: Path) -> UserError:
    return UserError(f"{destination}: holds another data set or a damaged one; choose another place or add --force")


def _alike(existing: Manifest, raw: RawData, kept: Kept, settings: Settings) -> bool:
    """Whether ``existing`` can be equal to what is to be prepared: known before any image is decoded."""
    return (
        existing.modalities == _modalities(raw)
        and existing.max_seq_len == settings.max_seq_len
        and existing.image_size == settings.image_size
        and (existing.users, existing.items) == (len(kept.users), len(kept.items))
        and existing.interactions == len(kept.sequences)
    )


# --- the content -------------------------------------------------------------------------------------------


def _build(raw: RawData, kept: Kept, folder: Path, settings: Settings, progress: Progress) -> Manifest:
    """Write all files of the data set into ``folder``.

    Its fingerprint is the SHA-256 over everything that a reader of it can see, but not over its name.
    """
    skipped = Counter(raw.skipped)
    images = folder / "images.npy"
    if raw.pictures is not None and settings.skip_bad:
        kept = _write_good_images(raw, images, settings, progress, skipped)
    arrays: dict[str, NDArray[Any]] = {"offsets": kept.offsets, "sequences": kept.sequences}
    blobs = {
        "items.txt": names_as_text(raw.items[i] for i in kept.items),
        "users.txt": names_as_text(raw.users[i] for i in kept.users),
    }
    if raw.titles is not None:
        titles = [raw.titles[i].encode("utf-8") for i in kept.items]
        blobs["titles.bin"] = b"".join(titles)
        arrays["title_offsets"] = np.cumsum([0, 0, *map(len, titles)], dtype=np.int64)
    header = {"format": FORMAT_VERSION, "max_seq_len": settings.max_seq_len}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, blob in sorted(blobs.items()):
        (folder / name).write_bytes(blob)
        digest.update(f"\n{name} {len(blob)}\n".encode())
        digest.update(blob)
    if raw.pictures is not None:
        advance = _hashing(digest, images, len(kept.items), settings)
        if settings.skip_bad:
            for start in range(0, len(kept.items), _CHUNK):
                advance(min(_CHUNK, len(kept.items) - start))
        else:
            _decode(raw, kept.items, images, settings, progress, advance)
    for name, array in sorted(arrays.items()):
        np.save(folder / f"{name}.npy", array)
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
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


def _hashing(digest: _Hash, path: Path, items: int, settings: Settings) -> Callable[[int], None]:
    """Called with how many images have been written since the last call: takes them into ``digest``.

    While workers decode, this process has nothing else to do.
    """
    assert settings.image_size is not None
    size, row = settings.image_size, 1
    digest.update(f"\nimages |u1 {(items + 1, 3, size, size)}\n".encode())
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
    """Decode the pictures of ``items`` (n,) to rows 1..n of ``path``; returns indices in ``items`` that failed.

    ``then`` is called as the ``advance`` of ``decode_all`` is.
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


def _write_good_images(raw: RawData, path: Path, settings: Settings, progress: Progress, skipped: Counter[str]) -> Kept:
    """Decode, leave out what cannot be read, and write the images of the items that are kept then.

    Without a bad item, older items of its users move up into the last ``max_seq_len + 3``. So everything that these
    users ever had is decoded first.
    """
    every = keep(raw, last=None, min_interactions=settings.min_interactions)
    scratch = path.with_name("decoded.npy")
    failed = every.items[_decode(raw, every.items, scratch, settings, progress)]
    dropped = np.zeros(len(raw.items), bool)
    dropped[failed] = True
    last = settings.max_seq_len + 3
    kept = keep(raw, last=last, min_interactions=settings.min_interactions, dropped=dropped)
    if len(failed):
        skipped["unreadable image"] += len(failed)
        skipped["interaction with a skipped item"] += int(np.count_nonzero(dropped[_flattened(raw)[0]]))
    if np.array_equal(kept.items, every.items):
        scratch.rename(path)
        return kept
    decoded = np.load(scratch, mmap_mode="r")
    shape = (len(kept.items) + 1, *decoded.shape[1:])
    require_space(path.parent, int(np.prod(shape)))  # written through a map, where a full disk is a crash
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    rows = np.concatenate(([0], np.searchsorted(every.items, kept.items) + 1))
    for start in range(0, len(rows), _CHUNK):
        _mapped_anew(images, "r+")[start : start + _CHUNK] = _mapped_anew(decoded)[rows[start : start + _CHUNK]]
    scratch.unlink()
    return kept


def _mapped_anew(array: Any, mode: Literal["r", "r+"] = "r") -> NDArray[Any]:
    """The same mapped file through a mapping of its own.

    Pages that were touched count as this process's memory until their mapping goes: with one mapping for all rows,
    memory would grow with the number of items.
    """
    return np.memmap(array.filename, array.dtype, mode, array.offset, array.shape)
