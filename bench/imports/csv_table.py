"""Any published table as records: a CSV file with a row for each run, and a TOML file that says what its columns are.

``docs/imports.md`` explains the TOML file; ``TableMap`` is its schema.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from tpme.bench.errors import UserError, first_problem, nearest
from tpme.bench.imports.published import NOT_PUBLISHED, Published, memory_of
from tpme.bench.names import Line
from tpme.bench.parsing import read_regular, read_toml
from tpme.bench.quantities import BYTES
from tpme.bench.record import Failure, Frozen, ImportSource, NamedMetric, Parameters, Reading

TABLE_BYTES = 16 * 2**20
MOST_ROWS = 10_000
SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
EMPTY = ("", "-", "–", "n/a", "na", "nan")
"""Fields that hold no value."""
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+\.\d+")
"""A number with commas between thousands. Without a point it may be a decimal comma, so it is refused."""
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w .@/+-]{0,99}$")]


class _Amount(Frozen):
    """A column of numbers, its unit, and why a field of it may be empty."""

    column: Line
    reason: Line = "not in the table"


class Time(_Amount):
    """Seconds."""

    unit: Literal["ms", "s", "min", "h"] = "s"


class Count(_Amount):
    """A number of things."""

    unit: Literal["", "K", "M", "B"] = ""


class Size(_Amount):
    """Bytes; ``GB`` is 10^9, ``GiB`` 2^30."""

    unit: Line = "B"

    @model_validator(mode="after")
    def _known_unit(self) -> Size:
        if self.unit not in BYTES:
            raise ValueError(f"unit '{self.unit}': choose of {', '.join(BYTES)}")
        return self


class UsedMemory(Size):
    """M, and by what it was read."""

    instrument: Literal["torch_allocated", "torch_reserved", "nvml_device", "nvml_process", "host_rss"]
    definition: Line
    """In words, such as "max_memory_allocated of torch"."""


class Metric(_Amount):
    """A quality."""

    higher_is_better: bool
    factor: Annotated[float, Field(gt=0)] = 1.0
    """What a value is multiplied with: 0.01 turns percent into shares."""


class State(Frozen):
    """How runs ended."""

    column: Line
    ok: tuple[Line, ...] = ("ok", "success")
    """Values of those that finished; every other one is a row that did not."""


class TableMap(Frozen):
    """The file of ``--map``."""

    name: Line
    """Who measured: a publication or a tool."""
    reference: Line
    """Address, DOI or file."""
    commit: Line = ""
    task: Line
    data: Line
    device: Line
    device_kind: Literal["cpu", "cuda"] = "cuda"
    time_of: Line = "epoch"
    method: Line
    """The column of the method's name."""
    seed: Line | None = None
    """The column of seeds."""
    options: dict[Key, Line] = {}
    """Settings of a method -> their columns."""
    settings: dict[Key, Line | int | float | bool] = {}
    """What all rows share."""
    definitions: dict[Key, Line] = {}
    """What T, P, M and the metrics mean there."""
    time: Time
    total_time: Time | None = None
    trainable: Count | None = None
    total: Count | None = None
    stored: Size | None = None
    memory: UsedMemory | None = None
    metrics: dict[Key, Metric]
    status: State | None = None


def read_table(file: Path, mapping: Path) -> list[Published]:
    """The runs of a table, in its order.

    Raises:
        UserError: one of the files is missing or not what it should be; the message names the line.
    """
    chosen = _read_map(mapping)
    names, rows = _read_rows(file)
    for where, column in _columns(chosen):
        if column not in names:
            near = nearest(column, names)
            hint = f"did you mean '{near}'?" if near else f"there are {', '.join(names)}"
            raise UserError(f"{mapping}: {where}: {file} has no column '{column}'; {hint}")
    return [_run(chosen, dict(zip(names, row, strict=True)), f"{file}, line {line}") for line, row in rows]


def _read_map(path: Path) -> TableMap:
    try:
        raw = read_toml(path)
        return TableMap.model_validate(raw)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; docs/imports.md shows one") from None
    except ValidationError as error:
        first = first_problem(error)
        raise UserError(f"{path}: field '{first.field}': {first.message}") from None


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the number and fields of every line with any."""
    try:
        text = read_regular(path, TABLE_BYTES).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [field.strip() for field in row]) for row in reader if any(map(str.strip, row))]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not CSV in UTF-8: {error}") from None
    if len(lines) < 2:
        raise UserError(f"{path}: no rows below a header")
    if len(lines) > MOST_ROWS:
        raise UserError(f"{path}: more than {MOST_ROWS:,} lines")
    (_, names), *rows = lines
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"{path}: line 1: every column needs a name of its own")
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} fields, the header has {len(names)}")
    return names, rows


def _columns(chosen: TableMap) -> list[tuple[str, str]]:
    """Field of the map and column for every column that it names."""
    amounts = ("time", "total_time", "trainable", "total", "stored", "memory", "status")
    found = [("method", chosen.method), *([("seed", chosen.seed)] if chosen.seed else [])]
    found += [(f"options.{key}", column) for key, column in chosen.options.items()]
    found += [(name, one.column) for name in amounts if (one := getattr(chosen, name)) is not None]
    return found + [(f"metrics.{key}", metric.column) for key, metric in chosen.metrics.items()]


def _run(chosen: TableMap, row: Mapping[str, str], where: str) -> Published:
    method = row[chosen.method]
    if not method:
        raise UserError(f"{where}: no method in column '{chosen.method}'")
    ended = chosen.status is None or row[chosen.status.column] in chosen.status.ok
    said = "" if chosen.status is None else row[chosen.status.column]
    out_of_memory = "memory" in said.lower() or said.lower() == "oom"
    trainable, total, stored = (
        _value(row, one, units, where)
        for one, units in ((chosen.trainable, COUNTS), (chosen.total, COUNTS), (chosen.stored, BYTES))
    )
    metrics = {
        key: NamedMetric(value=_reading(row, one, one.factor, where), higher_is_better=one.higher_is_better)
        for key, one in chosen.metrics.items()
    }
    memory = {}
    if chosen.memory is not None:
        read = _reading(row, chosen.memory, BYTES[chosen.memory.unit], where, chosen.memory.definition)
        memory[f"{chosen.memory.instrument}_bytes"] = read
    total_s = None if chosen.total_time is None else _positive(row, chosen.total_time, where)
    source = ImportSource(
        name=chosen.name, reference=chosen.reference, commit=chosen.commit, definitions=_definitions(chosen)
    )
    return Published(
        where=where,
        task=chosen.task,
        data=chosen.data,
        method=method,
        options={key: _typed(row[column]) for key, column in chosen.options.items() if row[column] not in EMPTY},
        settings=dict(chosen.settings),
        device_name=chosen.device,
        device=chosen.device_kind,
        seed=_seed(row, chosen.seed, where),
        source=source,
        time_s=_positive(row, chosen.time, where),
        time_of=chosen.time_of,
        total_s=total_s,
        memory=memory_of(**memory),
        metrics=metrics,
        parameters=None
        if trainable is None
        else Parameters(
            trainable=round(trainable),
            trainable_max=round(trainable),
            total=None if total is None else round(total),
            by_group={},
            stored_bytes=None if stored is None else round(stored),
        ),
        status="ok" if ended else "oom" if out_of_memory else "error",
        failure=None if ended else Failure(phase="train", message=f"the table says: {said or 'nothing'}"),
    )


def _definitions(chosen: TableMap) -> dict[str, str]:
    """What the figures mean, by the words of reports; where the map says nothing, the column they are from."""
    of = {
        "T": chosen.time,
        "All in": chosen.total_time,
        "P": chosen.trainable,
        "Stored": chosen.stored,
        **chosen.metrics,
    }
    found = {key: f'column "{one.column}"' for key, one in of.items() if one is not None}
    if chosen.memory is not None:
        found["M"] = chosen.memory.definition
    if chosen.seed is None:
        found["Seed"] = NOT_PUBLISHED
    return found | chosen.definitions


def _number(row: Mapping[str, str], amount: _Amount, where: str) -> float | None:
    """The number in a column; None for an empty field."""
    text = row[amount.column]
    if text.lower() in EMPTY:
        return None
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        said = row[amount.column]
        raise UserError(f"{where}: '{said}' in column '{amount.column}' is not a number; correct it, or leave it empty")
    return value


def _value(row: Mapping[str, str], amount: Any, units: Mapping[str, float], where: str) -> float | None:
    value = None if amount is None else _number(row, amount, where)
    if value is not None and value < 0:
        raise UserError(f"{where}: {value:g} in column '{amount.column}' cannot be negative")
    return None if value is None else value * units[amount.unit]


def _reading(row: Mapping[str, str], amount: _Amount, factor: float, where: str, source: str = "") -> Reading:
    value, source = _number(row, amount, where), source or f"column {amount.column}"
    return Reading.missing(source, amount.reason) if value is None else Reading(value=value * factor, source=source)


def _positive(row: Mapping[str, str], time: Time, where: str) -> Reading:
    value = _value(row, time, SECONDS, where)
    source = f"column {time.column}"
    return Reading.missing(source, time.reason) if value is None else Reading(value=value, source=source)


def _seed(row: Mapping[str, str], column: str | None, where: str) -> int:
    if column is None:
        return 0
    try:
        return int(row[column])
    except ValueError:
        raise UserError(f"{where}: '{row[column]}' in column '{column}' is not a seed, a whole number") from None


def _typed(text: str) -> str | int | float:
    """A setting as a number where it is one: names of rows then read as those of our own."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text
