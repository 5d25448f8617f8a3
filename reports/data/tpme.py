"""TPME: training time, trainable parameters and memory of K methods as one number; lower is better.

``t' = (t - min T) / (max T - min T)``, likewise ``p'`` and ``m'`` over the K compared methods;
``TPME = a1 t' + a2 p' + a3 m'`` with ``a1 + a2 + a3 = 1`` and by default 0.45, 0.10, 0.45 (Fu et al., "IISAN",
SIGIR 2024). Where the paper leaves a choice: a column whose max equals its min adds 0 (so a single row
gets 0), only finished rows make the frame, and a row that ran out of memory gets a lower bound.

The value of a row depends on the K rows. A *frame*, the min and max of each column, can be stored in a file, and then
a new method cannot reorder the old ones; in such a frame a row may fall below 0 or above 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, ValidationError, model_validator

from tpme.bench.errors import UserError, first_problem
from tpme.bench.parsing import read_json
from tpme.bench.quantities import COSTS
from tpme.bench.record import Frozen
from tpme.bench.writing import write_atomically

COLUMNS = COSTS
"""T, P and M, in this order."""

Weight = Annotated[float, Field(ge=0, le=1)]


class Weights(Frozen):
    """Weights of time, parameters and memory; they add up to 1."""

    time: Weight = 0.45
    parameters: Weight = 0.10
    memory: Weight = 0.45

    @model_validator(mode="after")
    def _add_up_to_one(self) -> Weights:
        total = self.time + self.parameters + self.memory
        if abs(total - 1) > 1e-9:
            raise ValueError(f"they add up to {total:g}, not to 1")
        return self

    @classmethod
    def parse(cls, text: str) -> Weights:
        """From ``"0.45,0.10,0.45"`` (time, parameters, memory). Raises UserError for anything else."""
        try:
            time, parameters, memory = (float(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"weights '{text}': give three numbers for T,P,M such as 0.45,0.10,0.45") from None
        try:
            return cls(time=time, parameters=parameters, memory=memory)
        except ValidationError as error:
            message = first_problem(error).message
            raise UserError(f"weights '{text}': {message[0].lower()}{message[1:]}; give T,P,M from 0 to 1") from None

    def __str__(self) -> str:
        return f"{self.time:g},{self.parameters:g},{self.memory:g}"

    @property
    def values(self) -> tuple[float, float, float]:
        """In the order of ``COLUMNS``."""
        return self.time, self.parameters, self.memory


DEFAULT = Weights()
"""The weights of the paper."""


class Span(Frozen):
    """Smallest and largest value of one column."""

    min: float
    max: float

    @model_validator(mode="after")
    def _in_order(self) -> Span:
        if not self.min <= self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


class Frame(Frozen):
    """The min and max of each column of TPME, and the rows they come from."""

    epoch_time_s: Span
    trainable_millions: Span
    memory_bytes: Span
    rows: tuple[str, ...] = ()
    """The K rows of the frame."""
    group: dict[str, str] = {}
    """Device, protocol, data, encoders and precision of the rows; other rows must not use the frame."""


class FrameFile(Frozen):
    """Content of the file of ``--frame``: one frame for each comparable group."""

    schema_version: Literal[1] = 1
    frames: tuple[Frame, ...]


def members(df: pd.DataFrame) -> pd.Series[bool]:
    """Mask of the rows that can make a frame: finished (where ``df`` has a ``status``), with valid T, P and M."""
    known = df[list(COLUMNS)].notna().all(axis=1)
    if "status" in df:
        known &= df["status"] == "ok"
    for trust in ("epoch_time_valid", "memory_valid"):
        if trust in df:
            known &= df[trust].astype(bool)
    return known


def frame_of(df: pd.DataFrame, group: dict[str, str] | None = None) -> Frame | None:
    """The frame of those rows of ``df`` that can make one; None without such rows."""
    rows = df[members(df)]
    if rows.empty:
        return None
    spans = {name: Span(min=float(rows[name].min()), max=float(rows[name].max())) for name in COLUMNS}
    return Frame(**spans, rows=tuple(str(name) for name in rows.index), group=group or {})


def tpme(
    df: pd.DataFrame, weights: Weights | tuple[float, float, float] = DEFAULT, frame: Frame | None = None
) -> pd.Series[float]:
    """TPME of every row of ``df``, as a fraction (tables print percent); the index is that of ``df``.

    Args:
        df: the K compared rows with the columns ``COLUMNS`` (any unit, the same in all rows) and, where it has
            them, ``status``, ``epoch_time_valid`` and ``memory_valid``. Rows that are not ``ok``, or whose T, P
            or M is missing or not to be trusted, get NaN and do not shape the frame.
        weights: of T, P and M.
        frame: min and max to use instead of those of ``df``.
    """
    frame = frame or frame_of(df)
    result: pd.Series[float] = pd.Series(np.nan, index=df.index, name="tpme")
    if frame is not None:
        inside = members(df)
        result[inside] = _weighted(df[inside], _weights(weights), frame)
    return result


def lower_bound(
    df: pd.DataFrame, weights: Weights | tuple[float, float, float] = DEFAULT, frame: Frame | None = None
) -> pd.Series[float]:
    """Lower bound of TPME for rows that ran out of memory, in the frame of the finished rows; NaN for others.

    Memory is the largest reading before the failure (``memory_seen_bytes``). An unknown value counts as the smallest of
    the frame.
    """
    frame = frame or frame_of(df)
    result: pd.Series[float] = pd.Series(np.nan, index=df.index, name="tpme_lower_bound")
    failed = df["status"] == "oom"
    if frame is not None and failed.any():
        known = df[failed].assign(memory_bytes=df["memory_seen_bytes"])
        for name in COLUMNS:
            known[name] = known[name].astype(float).fillna(getattr(frame, name).min)
        result[failed] = _weighted(known, _weights(weights), frame)
    return result


def pareto(df: pd.DataFrame, cost: str = "tpme", quality: str = "recall_10") -> pd.Series[bool]:
    """Mask of the rows that no other row beats by less ``cost`` at no less ``quality``, or by more at the same cost.

    Rows that miss one of the two values are not on the front.
    """
    front = pd.Series(False, index=df.index, name="pareto")
    best = -np.inf
    order = df[[cost, quality]].dropna().astype(float).sort_values([cost, quality], ascending=[True, False])
    for _, same_cost in order.groupby(cost, sort=True):
        top = same_cost[quality].max()
        if top > best:
            front[same_cost.index[same_cost[quality] == top]] = True
            best = top
    return front


def _weighted(df: pd.DataFrame, weights: Weights, frame: Frame) -> pd.Series[float]:
    total = pd.Series(0.0, index=df.index)
    for name, weight in zip(COLUMNS, weights.values, strict=True):
        span: Span = getattr(frame, name)
        if span.max > span.min:
            total += weight * (df[name].astype(float) - span.min) / (span.max - span.min)
    return total


def _weights(weights: Weights | tuple[float, float, float]) -> Weights:
    if isinstance(weights, Weights):
        return weights
    return Weights.parse(",".join(repr(float(weight)) for weight in weights))


# --- frames in files -----------------------------------------------------------------------------------------


def write_frames(path: Path, frames: list[Frame]) -> None:
    """Write frames to a JSON file that people can review in a diff."""
    write_atomically(path, (FrameFile(frames=tuple(frames)).model_dump_json(indent=1) + "\n").encode())


def read_frames(path: Path) -> list[Frame]:
    """Read the file of ``write_frames``. Raises UserError for anything else."""
    try:
        return list(FrameFile.model_validate_json(json.dumps(read_json(path)), strict=True).frames)
    except FileNotFoundError:
        raise UserError(f"{path}: no such frame; name one that --frame made") from None
    except UserError as error:
        raise UserError(f"{error}; name a frame that --frame made, or a file that is not there") from None
    except ValidationError as error:
        first = first_problem(error)
        raise UserError(
            f"{path}: field '{first.field}': {first.message}; delete it, and --frame makes it anew"
        ) from None
