"""The files beside a record: the rank of every test user, and what was sampled while the cell ran.

Nothing in them is trusted: they are regular files in the record's folder with the content that the record names by
its SHA-256 (older records name none), of limited size, and their numbers are possible ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tpme.bench.archives import read_arrays
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, RecordError

MOST_BYTES = 2**29
"""Of an array: the ranks of 100 million users, or 60 million samples."""

Arrays = TypeVar("Arrays")


@dataclass(frozen=True)
class UserRanks:
    """Rank of every user's test target; all arrays have shape ``(users,)``."""

    rank: NDArray[Any]
    """From 1; ties count against the model."""
    target: NDArray[Any]
    cold: NDArray[Any]
    """The target never occurs in training."""
    in_history: NDArray[Any]
    """The target is masked because the user already had it, so it can never hit."""
    user: NDArray[Any] | None = None
    """Rows of the users in the prepared data, rising; ``None`` where they are all users in order."""

    def paired_with(self, other: UserRanks) -> bool:
        """Whether both are of the same users, in the same order, with the same targets."""
        users = [np.arange(len(ranks.rank)) if ranks.user is None else ranks.user for ranks in (self, other)]
        return np.array_equal(self.target, other.target) and np.array_equal(users[0], users[1])


@dataclass(frozen=True)
class Samples:
    """Step times and the memory curve of one cell."""

    step_s: NDArray[Any]
    """Seconds of each training step, shape ``(steps,)``."""
    step_epoch: NDArray[Any]
    """Epoch of each step, from 1, shape ``(steps,)``."""
    sample_t_s: NDArray[Any]
    """Seconds since the start of the cell, shape ``(samples,)``."""
    sample_bytes: NDArray[Any]
    """Memory in use at that time, NaN where it could not be read, shape ``(samples,)``."""


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file has this SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def side_file(
    record: Path, result: CellResult, name: str, is_recorded: Callable[[Path, str], bool] = has_digest
) -> Path | None:
    """Path of a file beside the record ``result`` at ``record``, checked; ``None`` where there is none.

    Args:
        is_recorded: as ``has_digest``; one that remembers what it has read is quicker for large files.

    Raises RecordError where it is missing, no regular file, not the one that was recorded, or, for ranks, impossible.
    """
    if name not in result.files:
        return None
    path = record.parent / result.files[name]
    if path.is_symlink() or not path.is_file():
        raise RecordError(f"{path}: {'not a regular file' if _exists(path) else 'no such file'}; run the cell again")
    expected = result.digests.get(name)
    if expected is not None and not is_recorded(path, expected):
        raise RecordError(f"{path}: it is not the file that was recorded (SHA-256 differs); run the cell again")
    if name == "ranks":
        _check_ranks(path, result)
    return path


def damage(
    record: Path,
    result: CellResult,
    names: Iterable[str] | None = None,
    is_recorded: Callable[[Path, str], bool] = has_digest,
) -> str | None:
    """The first thing that is wrong with the files beside a record, or those of these ``names``; else ``None``."""
    try:
        for name in result.files if names is None else names:
            path = side_file(record, result, name, is_recorded)
            if name == "samples" and path is not None:
                load_samples(path)
    except RecordError as error:
        return str(error).removesuffix("; run the cell again")
    return None


def load_ranks(path: Path | str) -> UserRanks:
    """Read the ranks beside a record. Raises RecordError for a missing, truncated, foreign or impossible file."""
    ranks = _load(Path(path), UserRanks)
    arrays = [values for field in fields(UserRanks) if (values := getattr(ranks, field.name)) is not None]
    if len(set(map(len, arrays))) != 1:
        raise RecordError(f"{path}: its arrays differ in length; run the cell again")
    if {ranks.rank.dtype.kind, ranks.target.dtype.kind} - set("iu"):
        types = f"{ranks.rank.dtype} and {ranks.target.dtype}"
        raise RecordError(f"{path}: ranks and targets are integers, not {types}; run the cell again")
    if not len(ranks.rank):
        raise RecordError(f"{path}: it holds no rank; run the cell again")
    if (least := int(min(ranks.rank.min(), ranks.target.min()))) < 1:
        raise RecordError(f"{path}: ranks and targets start at 1, this holds {least}; run the cell again")
    if ranks.user is not None and not _are_rows(ranks.user):
        raise RecordError(f"{path}: its users are not rows of the data in rising order; run the cell again")
    return ranks


def _are_rows(users: NDArray[Any]) -> bool:
    return users.dtype.kind in "iu" and int(users[0]) >= 0 and bool((users[1:] > users[:-1]).all())


def load_samples(path: Path | str) -> Samples:
    """Read step times and memory samples beside a record. Raises RecordError like ``load_ranks``."""
    samples = _load(Path(path), Samples)
    pairs = (samples.step_s, samples.step_epoch), (samples.sample_t_s, samples.sample_bytes)
    if any(len(a) != len(b) for a, b in pairs):
        raise RecordError(f"{path}: its arrays differ in length; run the cell again")
    times = samples.step_s, samples.sample_t_s
    if not all(bool((np.isfinite(values) & (values >= 0)).all()) for values in times):
        raise RecordError(f"{path}: it holds times that are negative or not finite; run the cell again")
    return samples


def _check_ranks(path: Path, result: CellResult) -> None:
    ranks, data = load_ranks(path), result.dataset
    if data is None:
        return
    users = data.users if data.evaluated_users is None else data.evaluated_users
    if len(ranks.rank) != users:
        raise RecordError(f"{path}: {len(ranks.rank):,} ranks of {users:,} users; run the cell again")
    if (ranks.user is None) != (data.evaluated_users is None):
        raise RecordError(f"{path}: it does not say of which users it is, or says so of all; run the cell again")
    if ranks.user is not None and (last := int(ranks.user[-1])) >= data.users:
        raise RecordError(f"{path}: user {last:,} (from 0) of {data.users:,}; run the cell again")
    if (most := int(max(ranks.rank.max(), ranks.target.max()))) > data.items:
        raise RecordError(f"{path}: rank or item {most:,} in a catalogue of {data.items:,}; run the cell again")


def _load(path: Path, kind: type[Arrays]) -> Arrays:
    """The arrays of an ``.npz`` file, as the dataclass ``kind`` names them."""
    try:
        every = fields(kind)  # type: ignore[arg-type]
        optional = [field.name for field in every if field.default is not MISSING]
        names = [field.name for field in every if field.name not in optional]
        arrays = read_arrays(path, names, MOST_BYTES, optional)
    except UserError as error:
        raise RecordError(f"{error}; run the cell again") from None
    if any(values.ndim != 1 for values in arrays.values()):
        raise RecordError(f"{path}: it does not hold arrays of one dimension; run the cell again")
    return kind(**arrays)


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()
