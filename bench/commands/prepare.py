"""``tpme prepare``: a data set in the prepared format, with progress while it works and a table of the result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tpme.bench.commands.options import PlainCommand, split_names
from tpme.bench.console import PlainConsole
from tpme.bench.errors import UserError

if TYPE_CHECKING:
    from tpme.bench.record import Modality
    from tpme.bench.task.dataset import Dataset
    from tpme.bench.task.sources.raw import RawData

app = typer.Typer(no_args_is_help=True, help="Turn a data set into the prepared format that cells read.")

Destination = Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write the prepared data set to.")]
Images = Annotated[Path | None, typer.Option(help="Folder or zip archive of images named by item.")]
Modalities = Annotated[str | None, typer.Option(help="text, image or text,image; by default all that the source has.")]
ImageSize = Annotated[int, typer.Option(min=1, max=4096, help="Side length of the stored images in pixels.")]
MaxSeqLen = Annotated[int, typer.Option(min=1, max=2**16, help="Longest input of the sequential encoder.")]
Workers = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Processes that decode images; by default one per core.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip and count bad input instead of stopping.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a different prepared data set at DEST.")]


@app.command("iisan", cls=PlainCommand)
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
    """Prepare a folder in IISAN's release format.

    It holds items.tsv, users.tsv and, in a folder or a zip archive, images.
    """
    from tpme.bench.task.sources.iisan import read_iisan

    chosen = parse_modalities(modalities)
    read = partial(read_iisan, source, images=images, modalities=chosen, skip_bad=skip_bad)
    run_prepare(read, destination, max_seq_len, image_size, workers, force, skip_bad)


@app.command("tables", cls=PlainCommand)
def prepare_tables(
    destination: Destination,
    interactions: Annotated[Path, typer.Option(metavar="FILE", help="Table of users, items and timestamps.")],
    items: Annotated[Path, typer.Option(metavar="FILE", help="Table of items and titles.")],
    images: Annotated[Path | None, typer.Option(help="Folder or zip archive of images.")] = None,
    modalities: Modalities = None,
    user_column: Annotated[str, typer.Option(metavar="NAME", help="Column of users.")] = "user",
    item_column: Annotated[str, typer.Option(metavar="NAME", help="Column of items, in both tables.")] = "item",
    time_column: Annotated[str, typer.Option(metavar="NAME", help="Column that orders interactions.")] = "timestamp",
    title_column: Annotated[str, typer.Option(metavar="NAME", help="Column of titles.")] = "title",
    image_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of image paths, below --images; by default named by item."),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(metavar="CHARACTER", help="Of CSV; by default a comma, and a tab in .tsv.")
    ] = None,
    interactions_header: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Columns of a CSV file without a header: user,item,timestamp.")
    ] = None,
    items_header: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Columns of a CSV file without a header: item,title.")
    ] = None,
    image_size: ImageSize = 224,
    max_seq_len: MaxSeqLen = 10,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Prepare two tables, and images, such as MicroLens.

    A table is CSV, or JSON Lines (.jsonl) or Parquet (.parquet) as its suffix says.
    """
    from tpme.bench.task.sources.table_files import TableFile
    from tpme.bench.task.sources.tables import Columns, read_tables

    chosen = parse_modalities(modalities)
    sign = parse_delimiter(delimiter)
    read = partial(
        read_tables,
        TableFile(interactions, "interactions", sign, split_names(interactions_header)),
        TableFile(items, "items", sign, split_names(items_header)),
        images=images,
        modalities=chosen,
        columns=Columns(
            user=user_column, item=item_column, timestamp=time_column, title=title_column, image=image_column
        ),
        skip_bad=skip_bad,
    )
    run_prepare(read, destination, max_seq_len, image_size, workers, force, skip_bad)


@app.command("synthetic", cls=PlainCommand)
def prepare_synthetic(
    destination: Destination,
    users: Annotated[int, typer.Option(min=1, max=10**7, help="Number of users.")] = 1000,
    items: Annotated[int, typer.Option(min=40, max=10**6, help="Number of items.")] = 1000,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Random seed; equal settings and seed give equal data.")
    ] = 12345,
    modalities: Modalities = None,
    image_size: ImageSize = 32,
    max_seq_len: MaxSeqLen = 10,
    workers: Workers = None,
    force: Force = False,
) -> None:
    """Prepare the built-in synthetic catalogue.

    Its users have tastes, so their interactions can be learned.
    """
    from tpme.bench.task.sources.synthetic import Synthetic, generate

    config = Synthetic(users=users, items=items, seed=seed)
    chosen = parse_modalities(modalities) or ("text", "image")
    run_prepare(lambda: generate(config, chosen), destination, max_seq_len, image_size, workers, force)


def parse_modalities(text: str | None) -> tuple[Modality, ...] | None:
    """``"text,image"`` as the modalities; ``None`` stays ``None``. Raises UserError for any other word."""
    from tpme.bench.record import Modality

    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    known = get_args(Modality)
    for word in words:
        if word not in known:
            raise UserError(f"--modalities {text}: '{word}' is none of {', '.join(known)}")
    return cast("tuple[Modality, ...]", tuple(modality for modality in known if modality in words))


def parse_delimiter(text: str | None) -> str | None:
    """``"tab"`` as a tab; ``None`` stays ``None``. Raises UserError for more than one character."""
    sign = "\t" if text in ("tab", "\\t") else text
    if sign is not None and (len(sign) != 1 or sign in '"\r\n'):
        raise UserError(f"--delimiter {text}: give one character, or the word tab")
    return sign


def run_prepare(
    read: Callable[[], RawData],
    destination: Path,
    max_seq_len: int,
    image_size: int,
    workers: int | None,
    force: bool,
    skip_bad: bool = False,
) -> None:
    """Read a source, prepare it and print the result; progress goes to stderr. Raises UserError as these do."""
    from tpme.bench.task.dataset import Dataset
    from tpme.bench.task.prepare import prepare

    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=PlainConsole(stderr=True)) as progress:
        reading = progress.add_task("Reading", total=1)
        raw = read()
        progress.advance(reading)
        prepare(
            raw,
            destination,
            max_seq_len=max_seq_len,
            image_size=image_size,
            workers=workers,
            progress=progress,
            skip_bad=skip_bad,
            force=force,
        )
    dataset = Dataset.open(destination)
    console = PlainConsole()
    console.print(summary(dataset))
    console.print(f"{destination} is ready", style="green", soft_wrap=True)


def summary(dataset: Dataset) -> Table:
    """A prepared data set in a few rows."""
    manifest = dataset.manifest
    table = Table(title=manifest.name, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("users", f"{manifest.users:,}")
    table.add_row("items", f"{manifest.items:,}")
    table.add_row("interactions", f"{manifest.interactions:,}")
    table.add_row("items never in training", f"{dataset.items_never_trained:,}")
    table.add_row("cold test targets", f"{dataset.cold_test_share:.2%}")
    table.add_row("modalities", ", ".join(manifest.modalities))
    if manifest.image_size is not None:
        table.add_row("image size", f"{manifest.image_size} x {manifest.image_size}")
    for reason, count in manifest.skipped.items():
        table.add_row(f"skipped: {reason}", f"{count:,}", style="yellow")
    table.add_row("fingerprint", manifest.fingerprint[:12])
    return table
