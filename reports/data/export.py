"""``tpme export``: all records as one tidy table, a row each, for other tools, and as runs in MLflow.

Earlier attempts and replaced records are included; ``latest`` marks the records that reports read. The other
columns are those of ``tpme.reports.data.load`` and, from the rest of the record: counters (``counter_``), every
instrument's training memory (``peak_``), wall time by kind of phase (``phase_``) and the environment
(``environment_``). A structure in the record becomes JSON text.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from tpme.bench.errors import UserError, missing_extra, one_line
from tpme.bench.mlflow_server import open_experiment, told
from tpme.bench.quantities import NAMED
from tpme.bench.record import CellResult
from tpme.bench.redact import publishable, without_home
from tpme.bench.text import csv_field
from tpme.bench.writing import write_atomically
from tpme.reports.data.load import Recorded, to_frame, with_quality

NUMERIC = re.compile(r"(_s|_j|_bytes|_millions|_\d+)$|^(counter|phase|peak(?!_phase$)|inference|metric)_|^best_epoch$")
"""Numeric columns, even where every value is missing."""
BOOLEAN = ("environment_deterministic", "environment_git_dirty")
"""Columns with true, false or a missing value."""
SEARCH = ("search_trials", "search_cells", "search_wall_s", "trial_valid_recall_10")
"""Columns over all trials of a row, from the latest records alone."""


def records_frame(records: Sequence[Recorded]) -> pd.DataFrame:
    """One row for each record, with all of its scalar content; row ``i`` describes ``records[i]``.

    A missing or invalid counter or memory is empty; the JSON object ``missing_reasons`` gives the reasons by column.
    Raises RecordError for broken ranks.
    """
    frame = with_quality(_cells(records))
    frame["flags"] = [
        json.dumps([{"code": code, "message": message} for code, message in flags]) for flags in frame["flags"]
    ]
    more = pd.DataFrame([_more(recorded.result) for recorded in records], index=frame.index)
    whole = pd.concat([frame, more[sorted(more.columns)]], axis=1)
    # Types must not depend on the run: files of several runs are read together.
    types = dict.fromkeys(map(str, whole.columns[whole.isna().all()]), "string")
    types |= {name: "float64" for name in map(str, whole.columns) if NUMERIC.search(name)}
    types |= {name: "boolean" for name in BOOLEAN if name in whole}
    types |= dict.fromkeys(SEARCH[:2], "Int64")
    return whole.astype(types)


def _cells(records: Sequence[Recorded]) -> pd.DataFrame:
    """The table of ``load`` with ``latest``; other records take no part in the search for a learning rate."""
    parts = []
    for latest in (True, False):
        places = [place for place, recorded in enumerate(records) if recorded.latest == latest]
        if places:
            part = to_frame([records[place] for place in places]).set_axis(places).assign(latest=latest)
            parts.append(part if latest else part.assign(selected=False, **dict.fromkeys(SEARCH)))
    return pd.concat(parts).sort_index()


def _more(result: CellResult) -> dict[str, Any]:
    memory = result.pass_memory
    readings = {f"counter_{name}": reading for name, reading in sorted(result.counters.items())}
    if memory is not None:
        readings |= {f"peak_{name}": getattr(memory, name) for name in type(memory).model_fields}
    others = {"epoch_time_s": result.epoch_time_s, **{NAMED + name: one.value for name, one in result.metrics.items()}}
    phases: dict[str, float] = {}
    for phase in result.phases:
        phases[f"phase_{phase.kind}_s"] = phases.get(f"phase_{phase.kind}_s", 0.0) + phase.wall_s
    unknown = {"python", "cpu_threads", "allocator", "deterministic", "hostname_hash"} if result.source else set()
    environment = result.environment.model_dump(exclude={"device_key", *unknown}) if result.environment else {}
    return {
        "schema_version": result.schema_version,
        **_source(result),
        **{name: reading.value if reading.valid else None for name, reading in readings.items()},
        "missing_reasons": json.dumps({name: one.reason for name, one in (readings | others).items() if not one.valid}),
        **phases,
        **{f"environment_{name}": _flat(value) for name, value in environment.items()},
        "dataset_facts": _flat(result.dataset.model_dump() if result.dataset else None),
    }


def _source(result: CellResult) -> dict[str, Any]:
    """Where a row of others is from, beside the column ``source``."""
    if result.source is None:
        return {}
    return {f"source_{name}": _flat(value) for name, value in result.source.model_dump(exclude={"name"}).items()}


def _flat(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list | tuple) else value


# --- files ---------------------------------------------------------------------------------------------------


def _csv(frame: pd.DataFrame) -> bytes:
    texts = frame.select_dtypes(["object", "string"])
    safe = frame.assign(**{str(name): texts[name].map(csv_field, na_action="ignore") for name in texts})
    return safe.rename(columns=csv_field).to_csv(index=False, lineterminator="\n").encode()


def _parquet(frame: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    try:
        frame.to_parquet(file, index=False, engine="pyarrow")
    except ImportError:
        raise missing_extra("Parquet", "pyarrow", "export") from None
    return file.getvalue()


def _sqlite(frame: pd.DataFrame) -> bytes:
    connection = sqlite3.connect(":memory:")
    try:
        frame.to_sql("cells", connection, index=False)
        return connection.serialize()
    except (sqlite3.Error, pd.errors.DatabaseError, ValueError) as error:  # thousands of counters, or a NUL in a name
        raise UserError(f"these records are no table of SQLite ({one_line(error)}); export them as .csv") from None
    finally:
        connection.close()


WRITERS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".sqlite": _sqlite,
    ".db": _sqlite,
}


def write_table(frame: pd.DataFrame, out: Path) -> None:
    """Write a table as its suffix says; the file appears whole or not at all.

    Raises:
        UserError: an unknown suffix, or Parquet without pyarrow.
    """
    writer = WRITERS.get(out.suffix.lower())
    if writer is None:
        raise UserError(f"--out {out}: name a file that ends in {', '.join(WRITERS)}")
    write_atomically(out, writer(frame))


# --- MLflow --------------------------------------------------------------------------------------------------

PARAMETERS = (
    "method", "cached", "options", "dataset", "modalities", "encoders", "protocol", "precision",
    "lr_trial", "device", "seed",
)  # fmt: skip
STRUCTURES = ("training", "lr")
"""Columns of JSON that become a parameter each setting: ``training.epochs``."""
CHANGING = ("latest", "selected")
"""Columns that later records can change: tags that every push updates."""
KEY = "tpme.record"
"""The tag that identifies a record; it prevents a second push."""
BATCH = 1000
"""Metrics in one request, the most that MLflow takes."""


def push(records: Sequence[Recorded], uri: str, experiment: str) -> tuple[int, int]:
    """Create an MLflow run for every new record; returns the numbers of new and of existing runs.

    A run that an interrupted push left unfinished is completed. In a complete one only the tags in ``CHANGING`` are
    updated.

    Raises:
        UserError: mlflow is not installed, or the server does not answer or refuses.
    """
    client, home = open_experiment("--mlflow", uri, experiment)
    from mlflow.exceptions import MlflowException

    frame, new = records_frame(records), 0
    try:
        for recorded, (_, row) in zip(records, frame.iterrows(), strict=True):
            new += _push_one(client, home, recorded, row)
    except MlflowException as error:
        raise UserError(f"--mlflow {uri}: {told(error)}") from None
    return new, len(records) - new


def _push_one(client: Any, experiment_id: str, recorded: Recorded, row: pd.Series[Any]) -> bool:
    from mlflow.entities import Param, RunTag

    result = recorded.result
    identity = f"{result.cell_id}\n{recorded.device_key}\n{result.attempt}\n{result.started_at}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    start_ms = int(1000 * datetime.fromisoformat(result.started_at).timestamp())
    there = client.search_runs([experiment_id], filter_string=f"tags.`{KEY}` = '{key}'", max_results=1)
    parameters, tags = _texts(row)
    if there and there[0].info.end_time:
        client.log_batch(there[0].info.run_id, tags=[RunTag(f"tpme.{name}", tags[name]) for name in CHANGING])
        return False
    name = f"{result.cell.label}, seed {result.cell.seed}"
    run = there[0] if there else client.create_run(experiment_id, start_time=start_ms, tags={KEY: key}, run_name=name)
    client.log_batch(
        run.info.run_id,
        params=[Param(name, value) for name, value in parameters.items()],
        tags=[RunTag(f"tpme.{name}", value[:5000]) for name, value in tags.items()],  # MLflow refuses longer ones
    )
    metrics = [*_metrics(row, start_ms), *_curves(result, start_ms)]
    for begin in range(0, len(metrics), BATCH):
        client.log_batch(run.info.run_id, metrics=metrics[begin : begin + BATCH])
    end_ms = start_ms + int(1000 * result.wall_s)
    client.set_terminated(run.info.run_id, status="FINISHED" if result.status == "ok" else "FAILED", end_time=end_ms)
    return True


def _texts(row: pd.Series[Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Settings as parameters, every other column that is not a number as a tag; without home folders."""
    parameters = {name: str(row[name]) for name in PARAMETERS}
    for name in STRUCTURES:
        parameters |= {f"{name}.{key}": str(value) for key, value in json.loads(row[name]).items()}
    rest = row.drop([*PARAMETERS, *STRUCTURES]).dropna()
    parameters = {name: without_home(value) for name, value in parameters.items() if value}
    return parameters, {str(name): publishable(str(value)) for name, value in rest.items() if _is_text(value)}


def _metrics(row: pd.Series[Any], start_ms: int) -> Iterator[Any]:
    from mlflow.entities import Metric

    for name, value in row.drop([*PARAMETERS, *STRUCTURES]).dropna().items():
        if _is_number(value):
            yield Metric(re.sub(r"[^\w\-. /]", "_", str(name)), float(value), start_ms, 0)


def _curves(result: CellResult, start_ms: int) -> Iterator[Any]:
    """Loss, time and validation quality of each epoch, as far as its task has them."""
    from mlflow.entities import Metric

    for epoch in result.epochs:
        for name in ("train_s", "loss", "valid_recall_10", "valid_ndcg_10"):
            if (value := getattr(epoch, name)) is not None:
                yield Metric(f"epoch_{name}", float(value), start_ms, epoch.index)
        for name, value in epoch.metrics.items():
            yield Metric(f"epoch_{name}", value, start_ms, epoch.index)


def _is_text(value: Any) -> bool:
    return not _is_number(value) and value != ""


def _is_number(value: Any) -> bool:
    return pd.api.types.is_number(value) and not pd.api.types.is_bool(value)
