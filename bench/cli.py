"""The command line, nothing else: every command parses its arguments and calls one function elsewhere.

Heavy imports (torch, transformers, pandas, matplotlib) happen inside the commands that need them, so that
``tpme --help`` and ``tpme report`` start at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tpme.bench.commands import gate as gate_cli
from tpme.bench.errors import UserError

INTERRUPTED = (129, 130, 143)
"""Exit codes of SIGHUP, SIGINT (into which typer turns a KeyboardInterrupt) and SIGTERM: 128 + the signal."""
ON_INTERRUPT = "interrupted; nothing half-written is left, the same command goes on from what is finished"

app = typer.Typer(
    name="tpme",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What parameter-efficient fine-tuning costs in multimodal sequential recommendation, and what it buys.",
)


prepare = typer.Typer(no_args_is_help=True, help="Turn a data set into the prepared format that cells read.")
app.add_typer(prepare, name="prepare")

Destination = Annotated[Path, typer.Argument(metavar="DEST", help="Folder in which the data set shall appear.")]
Images = Annotated[Path | None, typer.Option(help="Folder or zip archive of images named by item.")]
Modalities = Annotated[str | None, typer.Option(help="text, image or text,image; by default what there is.")]
ImageSize = Annotated[int, typer.Option(min=1, help="Side of the stored images in pixels.")]
MaxSeqLen = Annotated[int, typer.Option(min=1, help="Longest input of the sequential encoder.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that decode images; by default one a core.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad input out and count it, instead of stopping.")]
Force = Annotated[bool, typer.Option("--force", help="Replace another prepared data set at DEST.")]


@prepare.command("iisan")
def prepare_iisan(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder with items.tsv and users.tsv.")],
    destination: Destination,
    images: Images = None,
    modalities: Modalities = None,
    image_size: ImageSize = 224,
    max_seq_len: MaxSeqLen = 10,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """The format of IISAN's Amazon data: items.tsv, users.tsv and images."""
    from tpme.bench.commands.prepare import parse_modalities, run_prepare
    from tpme.bench.task.sources.iisan import read_iisan

    chosen = parse_modalities(modalities)
    run_prepare(
        lambda: read_iisan(source, images=images, modalities=chosen, skip_bad=skip_bad),
        destination,
        max_seq_len=max_seq_len,
        image_size=image_size,
        workers=workers,
        skip_bad=skip_bad,
        force=force,
    )


@prepare.command("tables")
def prepare_tables(
    destination: Destination,
    interactions: Annotated[Path, typer.Option(help="CSV with the columns user, item and timestamp.")],
    items: Annotated[Path, typer.Option(help="CSV with the columns item and title.")],
    images: Images = None,
    modalities: Modalities = None,
    user_column: Annotated[str, typer.Option(help="Name of that column in the header.")] = "user",
    item_column: Annotated[str, typer.Option(help="Name of that column in both headers.")] = "item",
    time_column: Annotated[str, typer.Option(help="Name of the column that orders interactions.")] = "timestamp",
    title_column: Annotated[str, typer.Option(help="Name of that column in the header.")] = "title",
    image_size: ImageSize = 224,
    max_seq_len: MaxSeqLen = 10,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Two CSV files and images named by item; MicroLens as published, too."""
    from tpme.bench.commands.prepare import parse_modalities, run_prepare
    from tpme.bench.task.sources.tables import Columns, read_tables

    chosen = parse_modalities(modalities)
    columns = Columns(user=user_column, item=item_column, timestamp=time_column, title=title_column)
    run_prepare(
        lambda: read_tables(interactions, items, images=images, modalities=chosen, columns=columns, skip_bad=skip_bad),
        destination,
        max_seq_len=max_seq_len,
        image_size=image_size,
        workers=workers,
        skip_bad=skip_bad,
        force=force,
    )


@prepare.command("synthetic")
def prepare_synthetic(
    destination: Destination,
    users: Annotated[int, typer.Option(min=1, help="Number of users.")] = 1000,
    items: Annotated[int, typer.Option(min=40, help="Number of items.")] = 1000,
    seed: Annotated[int, typer.Option(help="Equal settings and seed give equal data.")] = 12345,
    modalities: Modalities = None,
    image_size: ImageSize = 32,
    max_seq_len: MaxSeqLen = 10,
    workers: Workers = None,
    force: Force = False,
) -> None:
    """The built-in catalogue: invented items and users, with structure to be found."""
    from tpme.bench.commands.prepare import parse_modalities, run_prepare
    from tpme.bench.task.sources.synthetic import Synthetic, generate

    config = Synthetic(users=users, items=items, seed=seed)
    chosen = parse_modalities(modalities) or ("text", "image")
    run_prepare(
        lambda: generate(config).only(chosen),
        destination,
        max_seq_len=max_seq_len,
        image_size=image_size,
        workers=workers,
        force=force,
    )


@app.command()
def run(
    matrix: Annotated[str, typer.Argument(metavar="MATRIX", help="Name of a preset, or a TOML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/NAME.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Lay key=value over the matrix: training.epochs=2.")
    ] = None,
    methods_path: Annotated[list[Path] | None, typer.Option(help="Folder with further methods.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where catalogues and caches are kept between runs.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a cell may take.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Short for --set training.compile=true.")] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Short for --set training.cuda_graphs=true.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
) -> None:
    """Run what is missing of a matrix, every cell in a process of its own, and report."""
    from tpme.bench.commands.run import run_command

    switched_on = [name for name, on in (("compile", compiled), ("cuda_graphs", cuda_graphs)) if on]
    raise typer.Exit(
        run_command(
            matrix,
            out=out,
            device=device,
            settings=[*(settings or []), *(f"training.{name}=true" for name in switched_on)],
            methods_path=methods_path or [],
            store=store,
            time_limit_s=time_limit,
            report=report,
        )
    )


Records = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUNS",
        help="Run folders or record files; by default all below ./runs.",
        default_factory=lambda: [Path("runs")],
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


@app.command("report")
def report_command(
    runs: Records,
    out: Annotated[Path | None, typer.Option(help="Folder; by default RUN/report, of several runs ./report.")] = None,
    weights: Annotated[str, typer.Option(help="Of T, P and M in TPME; they add up to 1.")] = "0.45,0.10,0.45",
    frame: Annotated[
        Path | None, typer.Option(help="Measure TPME against the frame in this file; made where it is not there.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Rows that get a TPME: fft,lora,...")] = None,
    mix: Annotated[bool, typer.Option("--mix", help="One TPME over different devices, protocols or data.")] = False,
    title: Annotated[str | None, typer.Option(help="Title of report.md.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="What to write beside report.md: html,csv,json,tex,png,svg,pdf or all.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that draw; by default one a core.")] = None,
    show: Annotated[str, typer.Option(help="Tables to print: results,steps,plan,phases,... or all.")] = "results",
) -> None:
    """Turn records into tables, figures and report.md."""
    from rich.console import Console

    from tpme.bench.workers import available_cores
    from tpme.reports.data.section import parse_rows
    from tpme.reports.data.tpme import Weights
    from tpme.reports.report import FORMATS, write_report
    from tpme.reports.tables.results import TABLES

    single = runs[0] if len(runs) == 1 and runs[0].is_dir() else Path()
    folder = out or single / "report"
    console = Console()
    write_report(
        runs,
        folder,
        weights=Weights.parse(weights),
        frame=frame,
        rows=None if rows is None else parse_rows(rows),
        mix=mix,
        title=title,
        formats=None if formats is None else FORMATS if formats == "all" else _names(formats),
        workers=workers or available_cores(),
        show=[name for name in TABLES if name != "pairs"] if show == "all" else _names(show),  # too long
        console=console,
    )
    console.print(f"Written to {folder / 'report.md'}", markup=False)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


Share = Annotated[float | None, typer.Option(min=0, max=1, help="Least mean over the test users.")]


@app.command()
def choose(
    runs: Records,
    max_memory: Annotated[str | None, typer.Option(help="Most memory M: 8GB, 8GiB, 500MB.")] = None,
    max_epoch_time: Annotated[str | None, typer.Option(help="Longest epoch T: 500ms, 60s, 2min.")] = None,
    max_params: Annotated[str | None, typer.Option(help="Most trainable parameters P: 500K, 5M.")] = None,
    min_ndcg10: Share = None,
    min_recall10: Share = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or a part of the device's name: H200.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which rows keep your limits, best first, and why the others do not. Exit code 0 if any row does, 1 if none."""
    from tpme.reports.choose import choose_command

    raise typer.Exit(
        choose_command(
            runs,
            max_memory=max_memory,
            max_epoch_time=max_epoch_time,
            max_params=max_params,
            min_ndcg10=min_ndcg10,
            min_recall10=min_recall10,
            device=device,
            as_json=as_json,
        )
    )


@app.command()
def export(
    runs: Records,
    out: Annotated[Path | None, typer.Option(help="FILE.csv, FILE.parquet or FILE.sqlite.")] = None,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Push the records to this MLflow server.")] = None,
    experiment: Annotated[str, typer.Option(help="Experiment of MLflow.")] = "tpme",
) -> None:
    """Write all records to one tidy table, a row each, earlier attempts included, or push them to MLflow."""
    from tpme.reports.data.export import export_command

    export_command(runs, out=out, mlflow=mlflow, experiment=experiment)


@app.command()
def plan(
    matrix: Annotated[str, typer.Argument(metavar="MATRIX", help="Name of a preset, or a TOML file.")],
    device_profile: Annotated[
        str | None, typer.Option(help="h200, h100, a100-80gb, rtx4090, cpu-generic, here, or a TOML file.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Lay key=value over the matrix: training.epochs=2.")
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Plan for a data set of so many users.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Plan for a data set of so many items.")] = None,
    runs: Annotated[Path | None, typer.Option(help="Records to compare with; by default runs/NAME.")] = None,
    methods_path: Annotated[list[Path] | None, typer.Option(help="Folder with further methods.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where catalogues and profiles are kept between runs.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a matrix would cost, without running it: memory, FLOPs and, for a device, time."""
    from tpme.bench.commands.plan import plan_command

    raise typer.Exit(
        plan_command(
            matrix,
            profile=device_profile,
            settings=settings or [],
            users=users,
            items=items,
            runs=runs,
            methods_path=methods_path or [],
            store=store,
            as_json=as_json,
        )
    )


listing = typer.Typer(no_args_is_help=True, help="Show what there is to choose from.")
app.add_typer(listing, name="list")


@listing.command("methods")
def list_methods(
    as_json: AsJson = False,
    methods_path: Annotated[list[Path] | None, typer.Option(help="Folder with further methods.")] = None,
) -> None:
    """The fine-tuning methods and their options."""
    from tpme.bench.commands import list as catalogue

    catalogue.show(catalogue.methods(methods_path or []), as_json=as_json)


@listing.command("presets")
def list_presets(as_json: AsJson = False) -> None:
    """The matrices that ship with the package."""
    from tpme.bench.commands import list as catalogue

    catalogue.show(catalogue.presets(), as_json=as_json)


@listing.command("encoders")
def list_encoders(as_json: AsJson = False) -> None:
    """The built-in encoders; any other is given by hub id or folder."""
    from tpme.bench.commands import list as catalogue

    catalogue.show(catalogue.encoders(), as_json=as_json)


@app.command()
def doctor(
    as_json: AsJson = False,
    noise: Annotated[
        bool, typer.Option("--noise", help="Measure how far equal runs lie apart here first (two minutes).")
    ] = False,
    store: Annotated[Path | None, typer.Option(help="Where device profiles are kept.")] = None,
) -> None:
    """Show versions and devices, and how each quantity is measured on this machine."""
    from rich.console import Console

    from tpme.bench.commands.doctor import diagnose, render
    from tpme.bench.run.launch import store_folder

    folder = store_folder(store)
    if noise:
        from tpme.bench.commands.noise import measure_noise
        from tpme.bench.commands.run import choose_device

        measure_noise(choose_device("auto"), folder, Console(stderr=True))
    diagnosis = diagnose(folder)
    if as_json:
        print(diagnosis.model_dump_json(indent=1))  # noqa: T201
    else:
        render(diagnosis, Console())


gate_cli.register(app)


def main() -> NoReturn:
    """Entry point: a UserError becomes one line on stderr and exit code 2, Ctrl-C one line and exit code 130.

    So does what the file system refuses: no permission, a full disk.
    """
    try:
        app()
    except UserError as error:
        print(f"tpme: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"tpme: {where}{error.strerror}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except SystemExit as stop:
        if stop.code in INTERRUPTED:
            print(f"tpme: {ON_INTERRUPT}", file=sys.stderr)  # noqa: T201
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
