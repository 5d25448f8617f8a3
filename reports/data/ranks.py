"""The ranks that a cell recorded, and what each user adds to Recall@K and NDCG@K.

Every user has one target, so Recall@K is the hit rate and NDCG@K is ``1 / log2(1 + rank)`` for a hit (the ideal
DCG is 1). A target the user already had is masked in the ranking and never hits, whatever rank was recorded.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from tpme.bench.quantities import CUTOFFS
from tpme.bench.record import RecordError
from tpme.reports.data.stats import Floats

Metric = Literal["recall", "ndcg"]

METRICS: tuple[Metric, ...] = ("recall", "ndcg")
REPORTED: tuple[tuple[Metric, int], ...] = tuple((metric, k) for k, metric in product(CUTOFFS, METRICS))
"""The metrics and cut-offs of every table."""


@dataclass(frozen=True)
class Ranks:
    """Rank of every user's test target; all arrays have shape ``(users,)``."""

    rank: npt.NDArray[Any]
    """From 1; ties count against the model."""
    target: npt.NDArray[Any]
    cold: npt.NDArray[Any]
    """The target never occurs in training."""
    in_history: npt.NDArray[Any]
    """The target is masked because the user already had it, so it can never hit."""


def load_ranks(path: Path | str) -> Ranks:
    """Read the ranks beside a record. Raises RecordError for a missing, truncated or foreign file."""
    ranks = load_arrays(Path(path), Ranks)
    if len({len(getattr(ranks, field.name)) for field in fields(Ranks)}) != 1:
        raise RecordError(f"{path}: its arrays differ in length; run the cell again")
    if len(ranks.rank) and int(ranks.rank.min()) < 1:
        raise RecordError(f"{path}: ranks start at 1, this holds {int(ranks.rank.min())}; run the cell again")
    return ranks


def gains(ranks: Ranks, metric: Metric, k: int) -> Floats:
    """What each user adds to the metric at cut-off ``k``; shape ``(users,)``, values in [0, 1]."""
    hit: npt.NDArray[np.bool_] = (ranks.rank <= k) & ~ranks.in_history.astype(bool)
    if metric == "recall":
        return hit.astype(np.float64)
    return np.where(hit, 1 / np.log2(1 + np.maximum(ranks.rank, 1)), 0.0)


def mean_gains(path: Any) -> list[float]:
    """The mean over users of every metric in ``REPORTED``; NaN for a cell that left no ranks."""
    ranks = load_ranks(path) if isinstance(path, str) else None  # pandas may turn None into NaN
    if ranks is None or not len(ranks.rank):
        return [np.nan] * len(REPORTED)
    return [float(gains(ranks, metric, k).mean()) for metric, k in REPORTED]


# --- files ---------------------------------------------------------------------------------------------------

Arrays = TypeVar("Arrays")


def load_arrays(path: Path, kind: type[Arrays]) -> Arrays:
    """The arrays of an ``.npz`` file, as the dataclass ``kind`` names them. Raises RecordError."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:
            return kind(**{name: _array(file.read(f"{name}.npy")) for name in names})
    except KeyError as error:
        raise RecordError(f"{path}: {error.args[0]}; written by another version? run the cell again") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RecordError(f"{path}: not a readable .npz file ({error}); run the cell again") from None


_NPY = re.compile(rb"\x93NUMPY\x01\0..{'descr': '(\S+)', 'fortran_order': False, 'shape': \((\d+),\), } *\n", re.DOTALL)


def _array(data: bytes) -> npt.NDArray[Any]:
    """What ``np.load`` reads, in a third of its time: a report opens a file for every cell, and they are short."""
    header = _NPY.match(data)
    if header is None:
        raise ValueError("it does not hold arrays of one dimension")
    return np.frombuffer(data, header[1].decode(), int(header[2]), header.end()).copy()
