"""``tpme plan``: a matrix's counters as tables for people or as JSON for programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tpme.bench.commands.options import AsJson, Matrix, MethodsPath, Settings, Store
from tpme.bench.commands.plan_devices import devices_notes, devices_table, group_words
from tpme.bench.commands.plan_words import FITS, in_bytes, in_digits, in_time, plain_table, row_label, scale_of
from tpme.bench.console import PlainConsole, print_json
from tpme.bench.errors import UserError
from tpme.bench.quantities import MISSING
from tpme.bench.run.progress import remaining_table

if TYPE_CHECKING:
    from tpme.bench.counting.devices import DeviceProfile
    from tpme.bench.record import Cell, Modality
    from tpme.bench.run.plan import MatrixPlan, PlannedCell, Work

NARROWEST = 110
"""Columns: a number that is cut to fit a narrow screen, or a pipe, would be a wrong number."""


def plan(
    source: Matrix,
    device_profile: Annotated[
        str | None, typer.Option(help="h200, h100, a100-80gb, rtx4090, cpu-generic, here, or a TOML file.")
    ] = None,
    settings: Settings = None,
    users: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Plan for a data set with this many users.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(min=1, max=10**8, help="Plan for a data set with this many items.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Plan every cell on so many devices together; by default training.devices.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes over which these devices are spread evenly.")] = 1,
    runs: Annotated[Path | None, typer.Option(help="Records to compare with; by default runs/NAME.")] = None,
    methods_path: MethodsPath = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what a matrix costs without running it.

    Memory, FLOPs and, for a device, time.
    """
    from tpme.bench.counting.devices import load_profile
    from tpme.bench.run.launch import store_folder
    from tpme.bench.run.matrix import load_matrix
    from tpme.bench.run.plan import plan_matrix

    matrix = load_matrix(source, settings or [])
    folder = store_folder(store)
    if runs is None and (Path("runs") / matrix.name / "cells").is_dir():
        runs = Path("runs") / matrix.name
    elif runs is not None and not runs.exists():
        raise UserError(f"--runs {runs}: no such folder; 'tpme run {source}' writes one")
    planned = plan_matrix(
        matrix,
        store=folder,
        device=load_profile(device_profile, folder) if device_profile else None,
        users=users,
        items=items,
        devices=devices,
        nodes=nodes,
        runs=runs,
        methods_path=methods_path or [],
        console=PlainConsole(stderr=True),
    )
    if as_json:
        print_json(planned.model_dump_json(indent=1))
    else:
        render(planned, PlainConsole())
    raise typer.Exit(1 if any(cell.problem for cell in planned.cells) else 0)


# --- for people ----------------------------------------------------------------------------------------------------


def render(plan: MatrixPlan, console: Console) -> None:
    """Print the plan: a table for each setting, plan against measured where there are records, what is assumed."""

    def print_whole(table: Table) -> None:
        width, console.width = console.width, max(console.width, NARROWEST)
        console.print(table)
        console.width = width

    for setting, group in itertools.groupby(plan.cells, key=lambda planned: _setting(planned.cell)):
        cells = list(group)
        console.print(Text(f"{plan.matrix}: {setting}", "bold"))
        print_whole(_planned(cells, plan.device, _peak(plan)))
        for on, together in itertools.groupby(cells, key=group_words):
            if on:
                console.print(Text(f"Together on {on}; memory, traffic and computation of each device", "bold"))
                print_whole(devices_table(list(together), plan.device, _peak(plan)))
        if any(planned.measured for planned in cells):
            console.print(Text("Plan against measured: memory, a step, an epoch, and how many times the plan", "bold"))
            print_whole(_compared(cells, _peak(plan)))
            sources = {planned.measured.memory_source for planned in cells if planned.measured}
            console.print(Text(f"Measured memory: {'; '.join(sorted(filter(None, sources)))}", "dim"))
    for note in _notes(plan):
        console.print(Text(note, "dim"))
    if plan.remaining is not None:
        console.print(remaining_table(plan.remaining))
        console.print(Text(plan.remaining.text))
    for warning in plan.warnings:
        console.print(Text(warning, "yellow"))


def _setting(cell: Cell) -> str:
    encoders = [spec.source for spec in (cell.text_encoder, cell.image_encoder) if spec]
    training = cell.training
    words = [cell.dataset, *encoders, f"protocol {cell.protocol}", training.precision]
    if training.activation_checkpointing:
        words.append("activation checkpointing")
    return ", ".join(words)


def _peak(plan: MatrixPlan) -> str:
    """Header of the planned peak, which elsewhere than on a GPU is not that of the process."""
    return "Peak" if plan.on_gpu else "Tensors"


def _planned(cells: list[PlannedCell], device: DeviceProfile | None, peak: str) -> Table:
    works = [planned.work for planned in cells if planned.work]
    size, size_unit = scale_of((work.peak_bytes for work in works), "B")
    step, step_unit = scale_of((work.forward_flops + work.backward_flops for work in works), "FLOP")
    epoch, epoch_unit = scale_of((work.epoch_flops for work in works), "FLOP")
    users = sorted({planned.cell.training.users_per_batch for planned in cells})
    table = plain_table("Method", *(["Users\n/step"] if len(users) > 1 else []), "Trains\nM")
    for name in ("Weights", "Grads", "Optim.", "Saved", peak):
        table.add_column(f"{name}\n{size_unit}", justify="right", no_wrap=True)
    for name, unit in (("Forward", step_unit), ("Backw.", step_unit), ("Epoch", epoch_unit)):
        table.add_column(f"{name}\n{unit}", justify="right", no_wrap=True)
    if device is not None:
        table.add_column("Epoch\ntime", justify="right", no_wrap=True)
        table.add_column("Fits", justify="right", no_wrap=True)
    for planned in cells:
        if planned.work is None:
            table.add_row(row_label(planned, cells), *[Text("?", "red")] * (len(table.columns) - 1))
            continue
        row: list[str | Text] = [str(planned.cell.training.users_per_batch)] if len(users) > 1 else []
        row += _cells(planned.work, size, step, epoch)
        if planned.expected is not None:
            trains = planned.work.trainable > 0
            row += [in_time(planned.expected.epoch_s) if trains else MISSING, FITS[planned.expected.fits]]
        table.add_row(row_label(planned, cells), *row)
    return table


def _cells(work: Work, size: float, step: float, epoch: float) -> list[str | Text]:
    sizes = (work.weight_bytes, work.gradient_bytes, work.optimizer_bytes, work.saved_bytes, work.peak_bytes)
    return [
        f"{work.trainable / 1e6:.3f}",
        *(in_digits(value / size) for value in sizes),
        *(in_digits(value / step) for value in (work.forward_flops, work.backward_flops)),
        in_digits(work.epoch_flops / epoch),
    ]


def _compared(cells: list[PlannedCell], peak: str) -> Table:
    pairs = [(planned, planned.work, planned.measured) for planned in cells if planned.work and planned.measured]
    table = plain_table("Method")
    memories = [work.peak_bytes for _, work, _ in pairs]
    size, size_unit = scale_of(memories, "B")
    flop, flop_unit = scale_of((work.forward_flops + work.backward_flops for _, work, _ in pairs), "FLOP")
    for name in (f"{peak}\n{size_unit}", f"measured\n{size_unit}", "ratio", f"Step\n{flop_unit}"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (f"record\n{flop_unit}", "ratio", "Epoch", "measured", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for planned, work, measured in pairs:
        flops = work.forward_flops + work.backward_flops
        expected = planned.expected.epoch_s if planned.expected else None
        table.add_row(
            row_label(planned, cells),
            *_triple(work.peak_bytes, measured.memory_bytes, lambda value: in_digits(value / size)),
            *_triple(flops, measured.step_flops, lambda value: in_digits(value / flop)),
            *_triple(expected, measured.epoch_s, in_time),
        )
    return table


def _triple(plan: float | None, measured: float | None, write: Callable[[float], str]) -> tuple[str, str, str]:
    """Plan, measured, and measured over plan."""
    texts = [MISSING if value is None else write(value) for value in (plan, measured)]
    return texts[0], texts[1], f"{measured / plan:.2f}" if plan and measured else MISSING


def _notes(plan: MatrixPlan) -> list[str]:
    """What was counted and what was assumed; a step without encoders is part of one with them."""
    steps = dict.fromkeys(work.batch.partition(";")[0] for cell in plan.cells if (work := cell.work))
    notes = [
        *plan.assumptions,
        *(f"Step of {step}." for step in steps if not any(other.startswith(f"{step},") for other in steps)),
        "Exact: parameters and FLOPs of matrix products (1 multiply-add = 2). Saved: for the backward pass, with fused "
        f"attention. {_peak(plan)}: most memory that tensors take at one time in a simulated step, "
        "optimiser and cache included.",
    ]
    if not plan.on_gpu:
        notes.append(
            "On a CPU only tensors are planned. The process takes several times as much, for its allocator and the "
            "scratch space of its kernels, so whether a row fits is not known until a cell of it has run."
        )
    if (device := plan.device) is not None:
        notes.append(
            f"Device '{device.name}' ({device.source}): {device.memory_bytes / 1e9:.0f} GB; time by the roofline of "
            f"every operator at {device.efficiency:.0%} of its rates, data loading hidden."
        )
    notes += devices_notes(plan)
    lacking = sorted({name for cell in plan.cells if cell.work for name in cell.work.uncounted})
    if lacking:
        notes.append(f"Not counted, for want of a FLOP formula: {', '.join(lacking)}.")
    caches = dict.fromkeys(_caches(cell.label, cell.work.cache_bytes_by_encoder) for cell in plan.cells if cell.work)
    if shown := ", ".join(filter(None, caches)):
        notes.append(f"Feature cache, built once: {shown}.")
    for problem in dict.fromkeys(cell.problem for cell in plan.cells if cell.problem):
        labels = [cell.label for cell in plan.cells if cell.problem == problem]
        notes.append(f"Could not be counted: {', '.join(labels)}: {problem}")
    return notes


def _caches(label: str, sizes: Mapping[Modality, int]) -> str:
    """The feature caches of a row in words; empty where it has none."""
    parts = [f"{modality} {in_bytes(size)}" for modality, size in sizes.items()]
    return f"{label} {' and '.join(parts)}" if parts else ""
