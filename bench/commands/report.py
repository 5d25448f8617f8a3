"""``tpme report``: tables, figures and report.md of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpme.bench.commands.options import Records, split_names


def report(
    runs: Records,
    out: Annotated[Path | None, typer.Option(help="By default RUN/report, or ./report for several runs.")] = None,
    weights: Annotated[str, typer.Option(help="Weights of T, P and M in TPME; they add up to 1.")] = "0.45,0.10,0.45",
    frame: Annotated[
        Path | None, typer.Option(help="Take the 0 % and 100 % of TPME from this file, created if missing.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Rows that get a TPME: fft,lora,...")] = None,
    mix: Annotated[bool, typer.Option("--mix", help="One TPME across different devices, protocols or data.")] = False,
    history: Annotated[
        bool, typer.Option("--all", help="Also cells of earlier matrices and earlier versions of the code.")
    ] = False,
    reference: Annotated[str | None, typer.Option(help="Row that ratios of costs refer to; by default fft.")] = None,
    title: Annotated[str | None, typer.Option(help="Title of report.md.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="What to write beside report.md: html,csv,json,tex,png,svg,pdf or all.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes that draw; by default one per core.")
    ] = None,
    show: Annotated[str, typer.Option(help="Tables to print: results,inference,steps,phases,... or all.")] = "results",
) -> None:
    """Turn records into tables, figures and report.md."""
    from tpme.bench.console import PlainConsole
    from tpme.bench.workers import available_cores
    from tpme.reports.data.section import parse_rows
    from tpme.reports.data.tpme import Weights
    from tpme.reports.report import FORMATS, write_report
    from tpme.reports.tables.results import TABLES

    single = runs[0] if len(runs) == 1 and runs[0].is_dir() else Path()
    write_report(
        runs,
        out or single / "report",
        weights=Weights.parse(weights),
        frame=frame,
        rows=None if rows is None else parse_rows(rows),
        mix=mix,
        history=history,
        reference=reference,
        title=title,
        formats=None if formats is None else FORMATS if formats == "all" else split_names(formats),
        workers=workers or available_cores(),
        show=[name for name in TABLES if name != "pairs"] if show == "all" else split_names(show),  # too long
        console=PlainConsole(),
    )
