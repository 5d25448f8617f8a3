"""Rows of a table as text, from CSV, JSON Lines or Parquet: which one, the suffix of the file says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpme.bench.errors import UserError, missing_extra, one_line
from tpme.bench.parsing import open_regular
from tpme.bench.task.sources.reading import InputErrors, csv_rows, decoded_lines

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
TABS = (".tsv", ".tab")

Rows = Iterator[tuple[str, list[str]]]
"""Location, for messages, and the requested fields of every row."""


@dataclass(frozen=True)
class TableFile:
    """A file with a table.

    kind: ``interactions`` or ``items``, as in the options of the command. delimiter: of CSV; by default a tab in
    ``.tsv`` and ``.tab``, else a comma. header: names of the columns of a CSV file whose first line is data.
    """

    path: Path
    kind: str
    delimiter: str | None = None
    header: Sequence[str] = ()

    def rows(self, wanted: Mapping[str, str], errors: InputErrors) -> Rows:
        """Yield the requested fields of every row as text; a missing value is an empty text.

        Args:
            wanted: option that names the column, such as ``user`` -> its name in this file.
            errors: what is done about bad rows.

        Raises:
            UserError: the file cannot be read, lacks a column, or is Parquet without pyarrow.
        """
        suffix = self.path.suffix.lower()
        if self.header and suffix in (*JSON_LINES, *PARQUET):
            raise UserError(f"{self.path}: names its columns itself; leave --{self.kind}-header out")
        if suffix in PARQUET:
            return self._parquet_rows(wanted)
        return self._json_rows(wanted, errors) if suffix in JSON_LINES else self._csv_rows(wanted, errors)

    def _csv_rows(self, wanted: Mapping[str, str], errors: InputErrors) -> Rows:
        rows = csv_rows(self.path, errors, self.delimiter or ("\t" if self.path.suffix.lower() in TABS else ","))
        header = list(self.header) or [name.strip() for name in next(rows, ("", []))[1]]
        index = [self._place(option, name, header) for option, name in wanted.items()]
        for where, row in rows:
            if len(row) != len(header):
                errors.report("wrong column count", f"{where}: {len(row)} columns; the header has {len(header)}")
            else:
                yield where, [row[place] for place in index]

    def _place(self, option: str, name: str, header: list[str]) -> int:
        if name in header:
            return header.index(name)
        other = next((sign for sign in ";\t|," if len(header) == 1 and sign in header[0]), None)
        if other is not None:
            hint = f"its delimiter may be another: --delimiter {'tab' if other == chr(9) else repr(other)}"
        else:
            hint = f"choose one with --{option}-column, or name the columns of a file without a header with "
            hint += f"--{self.kind}-header {_USUAL[self.kind]}"
        raise UserError(
            f"{self.path}, line 1: no column '{name}' in the header ({', '.join(header) or 'empty file'}); {hint}"
        )

    def _json_rows(self, wanted: Mapping[str, str], errors: InputErrors) -> Rows:
        for number, line in decoded_lines(self.path, errors):
            where = f"{self.path}, line {number}"
            if not line.strip():
                continue
            try:  # numbers stay the text that they are in the file
                row = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
                fault = _fault(row, wanted)
                fields = [] if fault else [row[name] or "" for name in wanted.values()]
                "".join(fields).encode()  # raises ValueError for a lone surrogate
            except (ValueError, RecursionError) as error:
                errors.report("malformed row", f"{where}: not JSON ({error})")
                continue
            if fault:
                errors.report("malformed row", f"{where}: {fault}")
            else:
                yield where, fields

    def _parquet_rows(self, wanted: Mapping[str, str]) -> Rows:
        try:
            import pyarrow as arrow
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise missing_extra(f"{self.path}: Parquet", "pyarrow", "export") from None
        try:
            open_regular(self.path).close()
            file = ParquetFile(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or one_line(error)})") from None
        except arrow.ArrowException:
            raise UserError(f"{self.path}: not a Parquet file") from None
        names, number = file.schema_arrow.names, 0
        for option, name in wanted.items():
            if name not in names:
                raise UserError(f"{self.path}: no column '{name}' ({', '.join(names)}); choose with --{option}-column")
        batches = file.iter_batches(columns=list(dict.fromkeys(wanted.values())))
        while True:
            try:
                batch = next(batches, None)
                columns = [] if batch is None else [_texts(batch.column(name)) for name in wanted.values()]
            except (arrow.ArrowException, OSError, ValueError) as error:
                raise UserError(f"{self.path}: cannot be read after row {number} ({one_line(error)})") from None
            if batch is None:
                return
            for row in zip(*columns, strict=True):
                number += 1
                yield f"{self.path}, row {number}", list(row)


_USUAL = {"interactions": "user,item,timestamp", "items": "item,title"}
"""The columns of a file of each kind, in the order of most."""


def _fault(row: Any, wanted: Mapping[str, str]) -> str | None:
    """What is wrong with one line of JSON, if anything."""
    if not isinstance(row, dict):
        return "not a JSON object with a value for each column"
    for option, name in wanted.items():
        if name not in row:
            return f"no '{name}' ({', '.join(row)}); choose one with --{option}-column"
        if not isinstance(row[name], str | None):
            return f"'{name}' is neither text nor a number"
    return None


def _texts(column: Any) -> list[str]:
    """The values of a column of Arrow as text; times as whole numbers in their own unit, which order them."""
    if str(column.type).startswith(("timestamp", "date")):
        column = column.cast("int32" if str(column.type) == "date32[day]" else "int64")
    return ["" if value is None else str(value) for value in column.to_pylist()]
