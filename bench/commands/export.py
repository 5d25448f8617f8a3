"""``tpme export``: all records as one table for other tools, or as runs of an MLflow server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpme.bench.commands.options import Records
from tpme.bench.errors import UserError
from tpme.bench.redact import without_credentials


def export(
    runs: Records,
    out: Annotated[Path | None, typer.Option(help="FILE.csv, FILE.parquet or FILE.sqlite.")] = None,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Push the records to this MLflow server.")] = None,
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "tpme",
) -> None:
    """Write all records to one table, or push them to MLflow.

    The table has a row per record, earlier attempts included.
    """
    if out is None and mlflow is None:
        raise UserError("nothing to do: give --out FILE.csv (or .parquet, .sqlite), --mlflow URI, or both")
    from tpme.bench.console import PlainConsole
    from tpme.reports.data.export import push, records_frame, write_table
    from tpme.reports.data.load import read_every

    records = read_every(runs)
    if out is not None:
        frame = records_frame(records)
        write_table(frame, out)
        PlainConsole().print(f"Written to {out}: {len(frame)} records, {frame.shape[1]} columns", soft_wrap=True)
    if mlflow is not None:
        new, known = push(records, mlflow, experiment)
        server = without_credentials(mlflow)
        line = f"Pushed to {server}, experiment {experiment}: {new} new runs, {known} existed already"
        PlainConsole().print(line, soft_wrap=True)
