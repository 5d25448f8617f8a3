"""What ``tpme prepare`` shows: progress while it works, and a small table of what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tpme.bench.errors import UserError
from tpme.bench.record import Modality
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.raw import RawData


def parse_modalities(text: str | None) -> tuple[Modality, ...] | None:
    """``"text,image"`` as the modalities; ``None`` stays ``None``. Raises UserError for any other word."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    known = get_args(Modality)
    for word in words:
        if word not in known:
            raise UserError(f"--modalities {text}: '{word}' is none of {', '.join(known)}")
    return cast("tuple[Modality, ...]", tuple(modality for modality in known if modality in words))


def run_prepare(
    read: Callable[[], RawData],
    destination: Path,
    *,
    max_seq_len: int,
    image_size: int,
    workers: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> None:
    """Read a source, prepare it and print the result; progress goes to stderr. Raises UserError as these do."""
    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
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
    console = Console()
    console.print(summary(dataset))
    console.print(f"{destination} is ready", style="green", highlight=False, soft_wrap=True)


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
