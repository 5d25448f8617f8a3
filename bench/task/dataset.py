"""The prepared data set: a folder of memory-mapped arrays, the only data that cells read.

=====================  ==========================================================================================
``dataset.json``       the :class:`Manifest`; written last
``sequences.npy``      int32, flat: item ids of all users, oldest first; ids run from 1 to N, 0 is padding
``offsets.npy``        int64 (users + 1,): user u owns ``sequences[offsets[u]:offsets[u + 1]]``
``items.txt``          the source's names of items 1, 2, ..., one a line, UTF-8
``users.txt``          the source's names of the users, one a line, UTF-8
``titles.bin``         titles of items 1, 2, ..., one UTF-8 blob (text only)
``title_offsets.npy``  int64 (N + 2,): title i is ``titles.bin[title_offsets[i]:title_offsets[i + 1]]``; title 0 is ""
``images.npy``         uint8 (N + 1, 3, H, W), RGB, row 0 zeros (image only)
=====================  ==========================================================================================

Leave-one-out split: a user's last item is the test target, the second last the validation target, the others are for
training.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from tpme.bench.errors import UserError, first_problem, one_line
from tpme.bench.parsing import open_regular, read_json
from tpme.bench.record import DatasetFacts, Evaluation, Frozen, Modality
from tpme.bench.task.fingerprint import ContentDigest, is_unchanged

FORMAT_VERSION = 1
FILES = ("images.npy", "items.txt", "offsets.npy", "sequences.npy", "title_offsets.npy", "titles.bin", "users.txt")
"""What the fingerprint is of; each modality has its own ones among them."""
LONGEST = 2**16
"""Items of an input of the sequential encoder."""
USERS_PER_PART = 2**16
"""Users that are worked on at one time where something is made of all of them."""
_CHUNK = 2**20

Ids = NDArray[np.int32]


class Manifest(Frozen):
    """The content of ``dataset.json``, which describes a prepared data set."""

    format_version: Literal[1] = 1
    name: str
    source: str
    """Kind and location of the source, for people."""
    synthetic: dict[str, Any] | None = None
    """Settings given to the built-in catalogue; ``None`` for other data."""
    modalities: tuple[Modality, ...]
    users: PositiveInt
    items: PositiveInt
    interactions: PositiveInt
    max_seq_len: Annotated[PositiveInt, Field(le=LONGEST)]
    """Longest input of the sequential encoder; at most this many items plus three are kept per user."""
    image_size: PositiveInt | None
    """Height and width of the stored images in pixels."""
    skipped: dict[str, NonNegativeInt]
    """Counts of what ``--skip-bad`` left out, by reason."""
    fingerprint: str
    """SHA-256 of the content: equal fingerprints mean equal data."""


@dataclass(frozen=True)
class Split:
    """The data for ranking one target per user. All arrays are int32 and left-padded with 0.

    inputs: (users, max_seq_len), the items before the target, as input of the model.
    target: (users,), the item to rank.
    history: (users, max_seq_len + 2), all earlier items, which the ranking masks.
    """

    inputs: Ids
    target: Ids
    history: Ids


class Titles(Sequence[str]):
    """Titles by item id, decoded on access; index 0 is the empty title of the padding item."""

    def __init__(self, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self._blob, self._offsets = blob, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        start, end = self._offsets[position], self._offsets[position + 1]
        try:
            return self._blob[start:end].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"item {position}: its title is not UTF-8 ({error}); prepare the data again") from None


class Dataset:
    """A prepared data set, opened with :meth:`open`. Arrays are memory-mapped; derived ones are built on first use."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        sequences: Ids,
        offsets: NDArray[np.int64],
        titles: Titles | None,
        images: NDArray[np.uint8] | None,
    ) -> None:
        self.path, self.manifest = path, manifest
        self.sequences, self.offsets = sequences, offsets
        self.titles, self.images = titles, images
        self.evaluated: NDArray[np.int64] | None = None
        """Users whose targets are ranked, by row and rising; ``None`` for all."""

    @classmethod
    def open(cls, path: str | Path, store: Path | None = None) -> Dataset:
        """Open the folder ``path``; with a ``store`` its content is verified.

        Raises:
            UserError: it is missing, not a prepared data set, of another format version, or damaged.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if store is not None:
            verify(folder, manifest, store)
        sequences = _load(folder, "sequences.npy", np.int32, (manifest.interactions,))
        offsets = _load(folder, "offsets.npy", np.int64, (manifest.users + 1,))
        _require(bool(np.all(np.diff(offsets) >= 3)) and offsets[0] == 0, folder, "offsets.npy")
        _require(int(offsets[-1]) == len(sequences), folder, "offsets.npy")
        _require(int(sequences.min()) >= 1 and int(sequences.max()) <= manifest.items, folder, "sequences.npy")
        titles = images = None
        if "text" in manifest.modalities:
            bounds = _load(folder, "title_offsets.npy", np.int64, (manifest.items + 2,))
            blob = _blob(folder / "titles.bin")
            _require(bounds[0] == 0 and bool(np.all(np.diff(bounds) >= 0)), folder, "title_offsets.npy")
            _require(int(bounds[-1]) == len(blob), folder, "titles.bin")
            titles = Titles(blob, bounds)
        if "image" in manifest.modalities:
            side = manifest.image_size or 0
            images = _load(folder, "images.npy", np.uint8, (manifest.items + 1, 3, side, side))
        dataset = cls(folder, manifest, sequences=sequences, offsets=offsets, titles=titles, images=images)
        _require(_line_count(folder / "items.txt") == manifest.items, folder, "items.txt")
        _require(_line_count(folder / "users.txt") == manifest.users, folder, "users.txt")
        return dataset

    @cached_property
    def item_names(self) -> list[str]:
        """The source's names by item id, (N + 1); entry 0 is empty."""
        return item_names(self.path)

    @cached_property
    def user_names(self) -> list[str]:
        """The source's names of the users; the suite itself does not need them."""
        return _lines(self.path / "users.txt")

    @cached_property
    def train_slots(self) -> Ids:
        """The training items of every user, (users, max_seq_len + 1), left-padded with 0."""
        slots = np.empty((self.manifest.users, self.manifest.max_seq_len + 1), np.int32)
        for number, part in enumerate(self.train_parts()):
            slots[number * USERS_PER_PART :][: len(part)] = part
        return slots

    def train_parts(self) -> Iterator[Ids]:
        """Yield ``train_slots`` in order, ``USERS_PER_PART`` users at a time."""
        for start in range(0, self.manifest.users, USERS_PER_PART):
            users = np.arange(start, min(start + USERS_PER_PART, self.manifest.users))
            yield self._window(users, self.manifest.max_seq_len + 1, before_end=2)

    @cached_property
    def valid(self) -> Split:
        """The split whose target is the second last item of every user, or of those that are evaluated."""
        return self._split(before_end=1)

    @cached_property
    def test(self) -> Split:
        """The split whose target is the last item of every user, or of those that are evaluated."""
        return self._split(before_end=0)

    @cached_property
    def popularity(self) -> NDArray[np.float64]:
        """Each item's share of all training interactions, (N + 1,); 0 for an item never trained on, 1 for padding."""
        counts = np.zeros(self.manifest.items + 1, np.int64)
        for slots in self.train_parts():
            counts += np.bincount(slots.ravel(), minlength=len(counts))
        counts[0] = 0
        popularity: NDArray[np.float64] = counts / counts.sum()
        popularity[0] = 1.0
        return popularity

    @property
    def items_never_trained(self) -> int:
        """Number of items that occur only as validation or test targets."""
        return int(np.count_nonzero(self.popularity == 0))

    @property
    def cold_test_share(self) -> float:
        """Share of users whose test target does not occur in training."""
        return float(np.mean(self.popularity[self.sequences[self.offsets[1:] - 1]] == 0))

    def facts(self, name: str) -> DatasetFacts:
        """What a record says of the data, which its matrix calls ``name``."""
        shared = self.manifest.model_dump(exclude={"name", "format_version", "skipped"})
        evaluated = None if self.evaluated is None else len(self.evaluated)
        return DatasetFacts(
            name=name, items_never_trained=self.items_never_trained, evaluated_users=evaluated, **shared
        )

    def evaluate_on(self, evaluation: Evaluation) -> None:
        """Restrict ``valid`` and ``test`` to the sample of users that ``evaluation`` asks for.

        The sample depends on the content of the data and the seed of the evaluation alone, so it is the same for every
        method. A data set of no more users is evaluated on all of them.
        """
        users = self.manifest.users
        if evaluation.users is None or evaluation.users >= users:
            return
        seed = hashlib.sha256(f"{self.manifest.fingerprint} {evaluation.seed}".encode()).digest()
        rng = np.random.default_rng(list(seed))
        self.evaluated = np.sort(rng.choice(users, evaluation.users, replace=False))

    def gather_images(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Copy the images of items ``ids`` (n,): uint8 (n, 3, H, W).

        Raises:
            UserError: the data set has no images.
        """
        if self.images is None:
            raise UserError(f"{self.path}: prepared without images; prepare it again with --modalities text,image")
        gathered: NDArray[np.uint8] = np.asarray(self.images)[ids]
        return gathered

    def _split(self, *, before_end: int) -> Split:
        length = self.manifest.max_seq_len
        users = np.arange(self.manifest.users) if self.evaluated is None else self.evaluated
        return Split(
            inputs=self._window(users, length, before_end=before_end + 1),
            target=self.sequences[self.offsets[users + 1] - 1 - before_end],
            history=self._window(users, length + 2, before_end=before_end + 1),
        )

    def _window(self, users: NDArray[np.int64], width: int, *, before_end: int) -> Ids:
        """(n, width): the last ``width`` items of each of these users, (n,), before its last ``before_end`` ones."""
        index = (self.offsets[users + 1] - before_end)[:, None] - np.arange(width, 0, -1)
        inside = index >= self.offsets[users, None]
        return np.where(inside, self.sequences[np.maximum(index, 0)], np.int32(0))


def read_manifest(folder: Path) -> Manifest:
    """Read ``dataset.json`` of a prepared data set. Raises UserError if it is missing or of another version."""
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data set; run 'tpme prepare'")
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a prepared data set (no dataset.json); run 'tpme prepare'") from None
    except UserError as error:
        raise UserError(f"{error}; prepare the data set again") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version!r}, but this tpme reads {FORMAT_VERSION}; prepare it again")
    try:
        return Manifest.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        first = first_problem(error)
        raise UserError(f"{path}: field '{first.field}': {first.message}; prepare the data set again") from None


def content_digest(folder: Path, manifest: Manifest) -> str:
    """The fingerprint of what is in ``folder`` now. Raises UserError where a file is missing or no regular one."""
    digest = ContentDigest(manifest.format_version, manifest.max_seq_len)
    text, image = ("text" in manifest.modalities, "image" in manifest.modalities)
    try:
        for name in ("items.txt", *(["titles.bin"] if text else ()), "users.txt"):
            digest.add_file(folder / name)
        for name in (*(["images"] if image else ()), "offsets", "sequences", *(["title_offsets"] if text else ())):
            digest.add_array(folder / f"{name}.npy")
    except UserError as error:
        raise UserError(f"{error}; prepare the data set again") from None
    except Exception as error:  # NumPy raises many for a broken header
        raise UserError(f"{folder}: damaged ({one_line(error)}); prepare the data set again") from None
    return digest.hexdigest()


def verify(folder: Path, manifest: Manifest, store: Path) -> None:
    """Raise UserError where a file of the data set in ``folder`` is not what was prepared.

    Args:
        folder: of the data set. manifest: its ``dataset.json``.
        store: keeps what was read, so that the same files are not read again.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name in FILES]
    memory = store / "checked" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}.json"
    if is_unchanged(paths, manifest.fingerprint, lambda: content_digest(folder, manifest), memory):
        return
    prepared = (folder / "dataset.json").stat().st_mtime_ns
    later = ", ".join(path.name for path in paths if path.stat().st_mtime_ns > prepared)
    raise UserError(
        f"{folder}: its content is not what was prepared{f' (changed since: {later})' if later else ''}; prepare the "
        "data set again"
    )


def damage_of(folder: Path, store: Path) -> str | None:
    """Why the folder is no whole prepared data set; ``None`` where it is one. ``store`` as in ``verify``."""
    try:
        Dataset.open(folder, store)
    except UserError as error:
        return str(error)
    return None


def item_names(folder: Path) -> list[str]:
    """The source's names by item id, (N + 1), of the data set in ``folder``; entry 0 is empty."""
    return ["", *_lines(folder / "items.txt")]


def _lines(path: Path) -> list[str]:
    # splitlines() would also split at characters that a name may contain.
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({error}); prepare the data set again") from None


def _line_count(path: Path) -> int:
    """How many names the file holds; reads it in parts, for those of ten million users would fill a gigabyte."""
    decoder, count = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open_regular(path) as file:
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                decoder.decode(chunk)
                count += chunk.count(b"\n")
        decoder.decode(b"", final=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({error}); prepare the data set again") from None
    return count


def _load(folder: Path, name: str, dtype: type[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Map one array; a truncated file fails here and not during training."""
    try:
        open_regular(folder / name).close()
        array: NDArray[Any] = np.lib.format.open_memmap(folder / name, mode="r")
    except UserError as error:
        raise UserError(f"{error}; prepare the data set again") from None
    except Exception as error:  # NumPy raises many for a broken header
        message = f"{folder / name}: missing or damaged ({one_line(error)})"
        raise UserError(f"{message}; prepare the data set again") from None
    _require(array.dtype == dtype and array.shape == shape, folder, name)
    return array


def _blob(path: Path) -> NDArray[np.uint8]:
    try:
        open_regular(path).close()
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); prepare the data set again") from None


def _require(condition: bool, folder: Path, name: str) -> None:
    if not condition:
        raise UserError(f"{folder / name}: does not fit dataset.json (damaged or changed); prepare the data set again")
