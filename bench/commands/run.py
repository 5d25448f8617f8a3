"""``tpme run``: read a matrix, choose the device, run what is missing, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tpme.bench.errors import UserError
from tpme.bench.record import Status
from tpme.bench.run.launch import run_matrix, store_folder
from tpme.bench.run.matrix import load_matrix

UNFINISHED: frozenset[Status] = frozenset({"error", "killed", "timeout"})
"""Ends that make the exit code 1: the cell said nothing about its method."""


def run_command(
    source: str,
    *,
    out: Path | None,
    device: str,
    settings: Sequence[str],
    methods_path: Sequence[Path],
    store: Path | None,
    time_limit_s: float | None,
    report: bool,
) -> int:
    """Run the matrix and return the exit code: 1 where a cell ended in an error, was killed or took too long."""
    if time_limit_s is not None and not time_limit_s > 0:
        raise UserError(f"--time-limit {time_limit_s:g}: give a number of seconds above 0")
    console = Console()
    matrix = load_matrix(source, settings)
    run = out or Path("runs") / matrix.name
    chosen = choose_device(device)
    if matrix.training.cuda_graphs and chosen == "cpu":
        raise UserError("training.cuda_graphs needs a CUDA device, and these cells would run on the CPU; turn it off")
    told = f"{matrix.description or source}\nRecords go to {run}, device {chosen}."
    console.print(f"[bold]{escape(matrix.name)}[/]: {escape(told)}")
    results = run_matrix(
        matrix,
        run,
        store=store_folder(store),
        device=chosen,
        methods_path=methods_path,
        time_limit_s=time_limit_s,
        console=console,
    )
    if report:
        from tpme.reports.report import write_report

        write_report([run], run / "report", console=console)
    return 1 if any(result.status in UNFINISHED for result in results) else 0


def choose_device(wanted: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes a GPU where torch sees one.

    Raises UserError for another name and for a GPU that is not there.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {wanted}: choose cpu, cuda or auto")
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise UserError("--device cuda: torch sees no CUDA device; 'tpme doctor' says why, --device cpu runs without")
    return "cpu"
