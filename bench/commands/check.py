"""``tpme check`` and ``tpme baseline``: the commands around the comparison, with the exit codes that CI reads."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.quantities import Kind
from tpme.reports.gate.baseline import (
    Baseline,
    Side,
    from_records,
    load_baseline,
    load_runs,
    new_baseline,
    read_baseline,
    updated,
    write_baseline,
)
from tpme.reports.gate.check import judge
from tpme.reports.gate.formats import github_annotations, show, write
from tpme.reports.gate.measures import GateCell, cell_key
from tpme.reports.gate.verdict import ERROR, GateReport, Policy, conclude

_COUNTED = {
    "trainable_parameters": "trainable",
    "stored_bytes": "stored_bytes",
    "forward_flops": "forward_flops",
    "backward_flops": "backward_flops",
    "saved_bytes": "saved_bytes_math",
    "gradient_bytes": "gradient_bytes",
    "weight_bytes": "weight_bytes",
    "optimizer_bytes": "optimizer_bytes",
    "cache_bytes": "cache_bytes",
}
"""Counters as records name them, and the planner's fields of them."""


def guarded(work: Callable[[], int]) -> int:
    """The exit code of ``work``; whatever goes wrong in it is 3, for Python's own 1 would read as a regression."""
    try:
        return work()
    except UserError as error:
        print(f"tpme: {error}", file=sys.stderr)  # noqa: T201
    except OSError as error:  # no permission, a full disk
        print(f"tpme: {error.filename}: {error.strerror}" if error.filename else f"tpme: {error}", file=sys.stderr)  # noqa: T201
    except Exception:
        traceback.print_exc()
    return ERROR


def policy_of(require: str | None, **given: Any) -> Policy:
    """A policy from the options of a command; raises UserError for a value that makes no sense."""
    kinds = tuple(kind.strip() for kind in require.split(",")) if require else ()
    try:
        return Policy.model_validate({"require": kinds, **given})
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"][0] == "require":
            raise UserError(f"--require {require}: choose from {', '.join(get_args(Kind))}") from None
        raise UserError(f"{first['loc'][0]}: {first['msg']}") from None


def report_out(report: GateReport, *, everything: bool, github: bool, **files: Path | None) -> int:
    """Print the report, write the files that were asked for, and return the exit code."""
    show(report, Console(), everything=everything)
    if github:
        for line in github_annotations(report):
            print(line)  # noqa: T201
    write(report, **files)
    return report.exit_code


def check_command(runs: Sequence[Path], baseline: Path, policy: Policy, **output: Any) -> int:
    """Compare the records below ``runs`` with ``baseline``; returns the exit code."""
    started = time.perf_counter()
    base, head = load_baseline(baseline), load_runs(runs)
    report = conclude(
        judge(base, head, policy),
        policy,
        command="check",
        base=base.source,
        head=head.source,
        base_devices=tuple(base.devices),
        head_devices=tuple(head.devices),
        notes=(*base.notes, *head.notes, *_other_packages(base, head)),
        duration_s=time.perf_counter() - started,
    )
    return report_out(report, **output)


def _other_packages(base: Side, head: Side) -> tuple[str, ...]:
    both = sorted(base.packages.keys() & head.packages.keys())
    other = [name for name in both if base.packages[name] != head.packages[name]]
    told = ", ".join(f"{name} {base.packages[name]} -> {head.packages[name]}" for name in other)
    return (f"other versions than the base: {told}",) if told else ()


def baseline_command(
    runs: Sequence[Path],
    out: Path,
    *,
    count: str | None,
    settings: Sequence[str],
    methods_path: Sequence[Path],
    store: Path | None,
    mode: str,
) -> int:
    """Write the baseline of finished runs, or of a counted matrix, and say what it changes."""
    if bool(runs) == bool(count):
        raise UserError("give either run folders or --count MATRIX")
    if out.exists() and mode == "new":
        raise UserError(f"{out}: is there already; --update keeps what was not measured again, --replace nothing")
    console = Console()
    old = _replaced(out, mode, console) if out.exists() else None
    new = _counted(count, settings, methods_path, store) if count else from_records(runs)
    if old is not None:
        new = updated(old, new) if mode == "update" else new
        _show_changes(old, new, out, console)
    write_baseline(new, out)
    console.print(
        f"{out}: {len(new.cells)} cell{'s' * (len(new.cells) != 1)}, {out.stat().st_size / 1e3:.1f} kB, "
        f"measured on {', '.join(new.devices) or 'no device: exact counters alone'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for name, device in new.devices.items():
        floor = "unknown" if device.noise.time is None else f"{device.noise.time:.1%}"
        told = f"noise of time {floor} on {name} ({device.noise.source})"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    return 0


def _replaced(out: Path, mode: str, console: Console) -> Baseline | None:
    """The baseline that stands there; ``None`` for one of another version or a broken one, which can be replaced."""
    try:
        return read_baseline(out)
    except UserError as error:
        if mode == "update":
            raise
        console.print(f"replacing what cannot be compared with: {error}", markup=False, highlight=False, soft_wrap=True)
        return None


def _show_changes(old: Baseline, new: Baseline, out: Path, console: Console) -> None:
    before, after = (Side(str(out), {one.key: one for one in side.cells}) for side in (old, new))
    policy = Policy()
    cells = judge(before, after, policy)
    show(conclude(cells, policy, command="check", base=f"{out} as it was", head="now", duration_s=0.0), console)


def _counted(source: str, settings: Sequence[str], methods_path: Sequence[Path], store: Path | None) -> Baseline:
    """Exact counters of a matrix, on the meta device: no weights, no data, seconds."""
    from tpme.bench.measure.environment import package_versions
    from tpme.bench.run.launch import store_folder
    from tpme.bench.run.matrix import load_matrix
    from tpme.bench.run.plan import plan_matrix

    matrix = load_matrix(source, settings)
    plan = plan_matrix(matrix, store=store_folder(store), methods_path=methods_path, console=Console(stderr=True))
    cells = []
    for planned in plan.cells:
        work = planned.work
        counted = {} if work is None else {name: getattr(work, field) for name, field in _COUNTED.items()}
        cells.append(
            GateCell(
                key=cell_key(planned.cell),
                cell=planned.cell,
                status="error" if work is None else "ok",
                counters={name: value for name, value in counted.items() if value is not None},
            )
        )
    return new_baseline(cells, packages=package_versions())
