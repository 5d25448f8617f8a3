"""``tpme run``: read a matrix, choose the device, run what is missing, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpme.bench.commands.options import DeviceName, Matrix, MethodsPath, Settings, Store
from tpme.bench.console import LONGEST_LINE, PlainConsole
from tpme.bench.errors import UserError
from tpme.bench.text import visible

UNFINISHED = frozenset({"error", "killed", "timeout"})
"""Statuses that make the exit code 1, because they say nothing about the method."""


def run(
    source: Matrix,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/NAME.")] = None,
    device: DeviceName = "auto",
    settings: Settings = None,
    methods_path: MethodsPath = None,
    store: Store = None,
    time_limit: Annotated[float | None, typer.Option(metavar="SECONDS", help="Time limit of a cell.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Short for --set training.compile=true.")] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Short for --set training.cuda_graphs=true.")
    ] = False,
    save_adapters: Annotated[
        bool, typer.Option("--save-adapters", help="Save the trained delta of each cell beside its record.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the cells, but run none.")
    ] = False,
    log: Annotated[str | None, typer.Option(help="Log every epoch as it ends: tensorboard or mlflow.")] = None,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells beside each other on the CPU, which share its cores; by default 1.")
    ] = None,
) -> None:
    """Run the unfinished cells of a matrix, and report.

    Each cell runs in its own process.
    """
    from rich.text import Text

    from tpme.bench.run.engines.local import local_engine
    from tpme.bench.run.launch import choose_device, run_matrix, store_folder
    from tpme.bench.run.matrix import load_matrix

    if time_limit is not None and not 0 < time_limit <= 1e9:
        raise UserError(f"--time-limit {time_limit:g}: give a number of seconds above 0 and up to 1e9")
    switched_on = [name for name, on in (("compile", compiled), ("cuda_graphs", cuda_graphs)) if on]
    matrix = load_matrix(source, [*(settings or []), *(f"training.{name}=true" for name in switched_on)])
    folder = out or Path("runs") / matrix.name
    device_name = choose_device(device)
    if matrix.training.cuda_graphs and device_name == "cpu":
        raise UserError("training.cuda_graphs needs a CUDA device, and these cells would run on the CPU; turn it off")
    console = PlainConsole()
    live = None
    if log is not None:
        from tpme.bench.run.live import LiveLog

        live = LiveLog(log, folder, console)
    engine = local_engine(device_name, jobs, live)
    message = f"{visible(matrix.description or source, LONGEST_LINE)}\nRecords go to {folder}, device {device_name}."
    if live is not None:
        message += f"\nEpochs are logged live: {live.where}"
    console.print(Text.assemble((matrix.name, "bold"), f": {message}"))
    results = run_matrix(
        matrix,
        folder,
        store=store_folder(store),
        device=device_name,
        methods_path=methods_path or [],
        time_limit_s=time_limit,
        save_adapters=save_adapters,
        dry_run=dry_run,
        engine=engine,
        console=console,
    )
    if dry_run:
        return
    if report:
        from tpme.reports.report import write_report

        write_report([folder], folder / "report", console=console)
    raise typer.Exit(1 if any(result.status in UNFINISHED for result in results) else 0)
