"""``tpme doctor``: versions, devices and instruments of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tpme.bench.commands.options import AsJson, Store
from tpme.bench.console import PlainConsole, print_json

if TYPE_CHECKING:
    from tpme.bench.commands.diagnosis import Diagnosis
    from tpme.bench.counting.devices import DeviceNoise

_MARKS = {"yes": Text("yes", "green"), "doubtful": Text("doubtful", "yellow"), "no": Text("no", "red")}


def doctor(
    as_json: AsJson = False,
    noise: Annotated[
        bool, typer.Option("--noise", help="First measure how much identical runs differ here (two minutes).")
    ] = False,
    store: Store = None,
) -> None:
    """Show versions, devices and instruments of this machine.

    For every quantity: how it is measured here, or why it is not.
    """
    from tpme.bench.commands.diagnosis import diagnose
    from tpme.bench.run.launch import choose_device, store_folder

    folder = store_folder(store)
    if noise:
        from tpme.bench.commands.noise import measure_noise

        measure_noise(choose_device("auto"), folder, PlainConsole(stderr=True))
    diagnosis = diagnose(folder)
    if as_json:
        print_json(diagnosis.model_dump_json(indent=1))
    else:
        render(diagnosis, PlainConsole())


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis as tables."""
    for title, rows in (("Software", _software(diagnosis)), ("Machine", _machine(diagnosis))):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True, min_width=14)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        _print(console, title, table)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("Quantity", no_wrap=True, min_width=14)
    table.add_column("Here", no_wrap=True)
    table.add_column("How, or why not", overflow="fold")
    for quantity in diagnosis.quantities:
        how = quantity.how if quantity.why is None else f"{quantity.how}: {quantity.why}"
        table.add_row(quantity.name, _MARKS[quantity.state], how)
    _print(console, f"What is measured on this {'GPU' if diagnosis.device == 'cuda' else 'CPU'}", table)
    console.print(_noise(diagnosis.noise))
    for flag in diagnosis.flags:
        console.print(Text(f"! {flag.message}", "yellow"))


def _noise(noise: DeviceNoise | None) -> Text:
    if noise is None:
        return Text("Noise floor of this device: not measured yet; run 'tpme doctor --noise'", "dim")
    return Text(
        f"Noise floor of this device: time ±{noise.noise_time_ratio:.1%}, memory ±{noise.noise_memory_ratio:.1%} "
        f"({noise.source}); the harness adds {noise.overhead_ratio:.2%} to an epoch"
    )


def _print(console: Console, title: str, body: RenderableType) -> None:
    console.print(Text(title, "bold"))
    console.print(body)
    console.print()


def _software(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "python", diagnosis.python
    yield from diagnosis.packages.items()
    if diagnosis.git_revision is not None:
        yield "revision", diagnosis.git_revision[:12] + (" with changes" if diagnosis.git_dirty else "")


def _machine(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "platform", diagnosis.platform
    yield "processor", f"{diagnosis.cpu}; {diagnosis.cores} cores usable, {diagnosis.threads} threads used"
    yield "memory", _size(diagnosis.memory_bytes)
    yield "allocator", diagnosis.allocator
    yield "CUDA", diagnosis.cuda
    yield "NVML", diagnosis.nvml or f"driver {diagnosis.driver}"
    for gpu in diagnosis.gpus:
        use = "memory not readable"
        if gpu.total_bytes is not None and gpu.used_bytes is not None:
            use = f"{_size(gpu.total_bytes)}, {_size(gpu.used_bytes)} in use"
        others = f" by {gpu.processes} process{'es' * (gpu.processes != 1)}" if gpu.processes else ""
        yield "MIG instance" if gpu.is_mig else "GPU", f"{gpu.name}, {use}{others}; {gpu.uuid}"
    yield "attention", diagnosis.attention
    hub = diagnosis.hub
    yield "encoder cache", f"{hub.folder} ({'offline' if hub.offline else 'downloads allowed'})"
    yield "", ", ".join(hub.models) or "no encoder downloaded yet"


def _size(count: int) -> str:
    from pydantic import ByteSize

    return ByteSize(count).human_readable(separator=" ")
