"""``tpme baseline``: the file that ``tpme check`` compares with, from finished runs or from a counted matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpme.bench.commands.options import MethodsPath, Settings, Store
from tpme.bench.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tpme.reports.gate.baseline import Baseline, Noise

_FIELDS = {"trainable_parameters": "trainable", "saved_bytes": "saved_bytes_math"}
"""Fields of the planner that are not named like the counter of a record."""


def baseline(
    out: Annotated[Path, typer.Option(help="The baseline file.")],
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUNS", help="Run folders.")] = None,
    count: Annotated[str | None, typer.Option(metavar="MATRIX", help="Count this matrix without running it.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Keep the cells that were not measured again.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the whole file.")] = False,
    settings: Settings = None,
    methods_path: MethodsPath = None,
    store: Store = None,
) -> None:
    """Write or update the baseline that 'tpme check' compares with."""
    if bool(runs) == bool(count):
        raise UserError("give either run folders or --count MATRIX")
    if out.exists() and not (update or replace):
        raise UserError(f"{out}: already exists; --update keeps cells not measured again, --replace keeps none")
    from tpme.bench.console import PlainConsole
    from tpme.reports.gate.baseline import from_records, updated, write_baseline

    console = PlainConsole()
    old = _replaced(out, update and not replace, console) if out.exists() else None
    new = _counted(count, settings or [], methods_path or [], store) if count else from_records(runs or [])
    if old is not None:
        new = updated(old, new) if update and not replace else new
        _show_changes(old, new, out, console)
    write_baseline(new, out)
    console.print(
        f"{out}: {len(new.cells)} cell{'s' * (len(new.cells) != 1)}, {out.stat().st_size / 1e3:.1f} kB, "
        f"measured on {', '.join(new.devices) or 'no device: exact counters only'}",
        soft_wrap=True,
    )
    for name, device in new.devices.items():
        console.print(_noise_line(name, device.noise), soft_wrap=True)


def _noise_line(name: str, noise: Noise) -> str:
    """The noise of the times of a device, and what it lets 'tpme check' see."""
    from tpme.reports.gate.check import MEASURE_AGAIN
    from tpme.reports.gate.verdict import MOST_NOISE, Policy

    if noise.time is None:
        return f"time noise unknown on {name} ({noise.source})"
    usual = Policy().time_threshold
    seen = f"'tpme check' sees changes of time above {max(usual, noise.time):.0%}"
    if noise.time > MOST_NOISE * usual:
        seen = f"too much for 'tpme check' to compare times: {MEASURE_AGAIN}"
    return f"time noise {noise.time:.1%} on {name} ({noise.source}): {seen}"


def _replaced(out: Path, update: bool, console: Console) -> Baseline | None:
    """The baseline to be replaced; ``None`` if it is broken or of another version."""
    from tpme.reports.gate.baseline import read_baseline

    try:
        return read_baseline(out)
    except UserError as error:
        if update:
            raise
        console.print(f"replacing a file that is not usable: {error}", soft_wrap=True)
        return None


def _show_changes(old: Baseline, new: Baseline, out: Path, console: Console) -> None:
    from tpme.reports.gate.baseline import Side
    from tpme.reports.gate.check import judge
    from tpme.reports.gate.formats import show
    from tpme.reports.gate.verdict import Policy, conclude

    before, after = (Side(str(out), {cell.key: cell for cell in side.cells}, side.devices) for side in (old, new))
    policy = Policy()
    cells = judge(before, after, policy)
    show(conclude(cells, policy, command="check", base=f"{out} before", head="now", duration_s=0.0), console)


def _counted(source: str, settings: Sequence[str], methods_path: Sequence[Path], store: Path | None) -> Baseline:
    """Exact counters of a matrix, on the meta device: no weights, no data, seconds."""
    from tpme.bench.console import PlainConsole
    from tpme.bench.measure.environment import package_versions
    from tpme.bench.quantities import COUNTERS
    from tpme.bench.run.launch import store_folder
    from tpme.bench.run.matrix import load_matrix
    from tpme.bench.run.plan import plan_matrix
    from tpme.reports.gate.baseline import new_baseline
    from tpme.reports.gate.measures import GateCell, cell_key

    matrix = load_matrix(source, settings)
    plan = plan_matrix(matrix, store=store_folder(store), methods_path=methods_path, console=PlainConsole(stderr=True))
    cells = []
    for planned in plan.cells:
        values = {name: getattr(planned.work, _FIELDS.get(name, name), None) for name in COUNTERS}
        cells.append(
            GateCell(
                key=cell_key(planned.cell),
                cell=planned.cell,
                status="error" if planned.work is None else "ok",
                counters={name: value for name, value in values.items() if value is not None},
            )
        )
    return new_baseline(cells, packages=package_versions())
