"""``tpme ab``: the same cells with two revisions of the code, interleaved on one device.

Base and head take turns (A B B A ...), so that whatever slows the machine for a while slows both. What then looks
changed is measured once more before anything is said about it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from tpme.bench.commands.check import report_out
from tpme.bench.commands.run import choose_device
from tpme.bench.errors import UserError
from tpme.bench.record import (
    Cell,
    CellResult,
    Failure,
    Reading,
    Status,
    read_result,
    write_atomically,
    write_result,
)
from tpme.bench.run.launch import command
from tpme.bench.run.matrix import presets
from tpme.bench.run.process import run_process
from tpme.bench.run.trees import Tree, trees
from tpme.reports.data.load import Recorded
from tpme.reports.gate.interleaved import judge_runs, suspicious, undecided
from tpme.reports.gate.measures import cell_key
from tpme.reports.gate.verdict import CellVerdict, GateReport, Policy, conclude

SIDES = ("base", "head")
MOST_TIMES = 4
"""How often a cell is measured at most: twice where it looks changed, more often where noise hides how much."""
_SIDE_SCRIPT = Path(__file__).parents[1] / "run" / "side.py"


@dataclass(frozen=True)
class Request:
    """What is to be run on both sides.

    matrix, settings, methods: as in ``tpme run``; ``methods`` limits its rows, empty means all. methods_path: folders
    with methods, those inside the repository are taken from each side's checkout. rounds: pairs of runs of each cell.
    """

    matrix: str
    settings: Sequence[str] = ()
    methods: Sequence[str] = ()
    methods_path: Sequence[Path] = ()
    rounds: int = 2
    device: str = "auto"
    time_limit_s: float | None = None


@dataclass
class Pair:
    """One cell on both sides: its jobs and, as they come, its runs."""

    key: str
    cell: Cell
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str | None = None
    """Why a side cannot run it."""
    runs: dict[str, list[Recorded]] = field(default_factory=lambda: {side: [] for side in SIDES})


def ab_command(
    base: str, head: str | None, request: Request, policy: Policy, *, repository: Path, out: Path | None, **output: Any
) -> int:
    """Compare two revisions and return the exit code of the gate; ``head=None`` is the work tree."""
    console = Console()
    with trees(repository, base, head) as sides:
        folder = _fresh(out or Path("runs") / "ab")
        told = f"{sides[0].name} against {sides[1].name}; records go to {folder}"
        console.print(escape(told), highlight=False)
        started = time.perf_counter()
        pairs = plan_pairs(sides, request, folder, repository)
        report = compare(pairs, sides, policy, folder, rounds=request.rounds, started=started, console=console)
    return report_out(report, **output)


def compare(
    pairs: Sequence[Pair],
    sides: tuple[Tree, Tree],
    policy: Policy,
    folder: Path,
    *,
    rounds: int,
    started: float,
    console: Console,
) -> GateReport:
    """Run all cells on both sides, what looks changed once more, what noise hides up to ``MOST_TIMES``, and judge.

    Args:
        pairs: planned by ``plan_pairs``. sides: base and head. folder: for the records. rounds: pairs of runs of each
            cell before it is judged. started: ``time.perf_counter`` of when the command began.
    """
    commands = {side: tree.command for side, tree in zip(SIDES, sides, strict=True)}
    both = [pair for pair in pairs if len(pair.jobs) == len(SIDES)]
    names = (sides[0].name, sides[1].name)

    def measure(chosen: Sequence[Pair], why: str) -> None:
        for pair in chosen:
            with console.status(escape(f"{pair.cell.label}: {why}")):
                _interleave(pair, commands, folder, rounds)

    def judge(confirmed: dict[str, int]) -> list[CellVerdict]:
        base, head = ({pair.key: pair.runs[side] for pair in both} for side in SIDES)
        return judge_runs(base, head, policy, names, confirmed) if both else []

    measure(both, "base and head in turn")
    verdicts = judge({})
    doubtful = {cell.key for cell in verdicts if suspicious(cell, policy)}
    times: dict[str, int] = {}
    for number in range(2, MOST_TIMES + 1):
        again = [pair for pair in both if pair.key in doubtful]
        if not again:
            break
        measure(again, "once more, to be sure")
        times |= {pair.key: number for pair in again}
        verdicts = judge(dict.fromkeys(times, rounds))
        doubtful = {cell.key for cell in verdicts if undecided(cell, policy)}
    devices = tuple(sorted({run.device_key for pair in both for runs in pair.runs.values() for run in runs}))
    return conclude(
        [*verdicts, *(_alone(pair) for pair in pairs if pair not in both)],
        policy,
        command="ab",
        base=names[0],
        head=names[1],
        base_devices=devices,
        head_devices=devices,
        notes=_told(times, both),
        duration_s=time.perf_counter() - started,
    )


def _told(times: dict[str, int], pairs: Sequence[Pair]) -> list[str]:
    """Which cells were measured more than once."""
    labels = {number: [pair.cell.label for pair in pairs if times.get(pair.key) == number] for number in times.values()}
    return [f"measured {number} times before judging: {', '.join(labels[number])}" for number in sorted(labels)]


def _alone(pair: Pair) -> CellVerdict:
    """A cell that only one side can run."""
    state: Literal["missing", "new"] = "missing" if "base" in pair.jobs else "new"
    return CellVerdict(key=pair.key, name=pair.cell.label, dataset=pair.cell.dataset, state=state, note=pair.problem)


# --- planning ------------------------------------------------------------------------------------------------


def plan_pairs(sides: tuple[Tree, Tree], request: Request, folder: Path, repository: Path) -> list[Pair]:
    """The cells of both sides, paired by what they run; each side plans with its own code.

    Raises UserError where a side cannot plan at all, and where there is nothing to run.
    """
    pairs: dict[str, Pair] = {}
    problems: dict[str, str] = {}
    for side, tree in zip(SIDES, sides, strict=True):
        answer = _ask_side(side, tree, request, folder, repository)
        problems |= {method: f"{tree.name}: {problem}" for method, problem in answer["problems"].items()}
        for job in answer["jobs"]:
            try:
                cell = Cell.model_validate(job["cell"])
            except ValidationError as error:
                first = error.errors()[0]["msg"]
                raise UserError(f"{tree.name}: its cells are not those of this tpme ({first})") from None
            pairs.setdefault(cell_key(cell), Pair(cell_key(cell), cell)).jobs[side] = job
    if not pairs:
        raise UserError(f"nothing to run: {'; '.join(problems.values())}")
    for pair in pairs.values():
        pair.problem = problems.get(pair.cell.method)
    return list(pairs.values())


def _ask_side(side: str, tree: Tree, request: Request, folder: Path, repository: Path) -> Any:
    """Let a side's own code plan the matrix, in a process of its own."""
    asked, answer = folder / f"{side}.request.json", folder / f"{side}.answer.json"
    source = request.matrix if request.matrix in presets() else str(Path(request.matrix).resolve())
    content = {
        "matrix": source,
        "settings": list(request.settings),
        "methods": list(request.methods),
        "methods_path": [str(_of_side(path, tree, repository)) for path in request.methods_path],
        "device": choose_device(request.device),
        "store": str((folder / f"{side}-store").resolve()),
        "runs": str((folder / side).resolve()),
        "time_limit_s": request.time_limit_s,
        "answer": str(answer.resolve()),
    }
    write_atomically(asked, json.dumps(content, indent=1).encode())
    command = [*tree.command, str(_SIDE_SCRIPT), str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        told = done.stderr.strip().splitlines() or ["no output"]
        raise UserError(f"{tree.name}: cannot plan its cells: {told[-1].removeprefix('tpme: ')}")
    return json.loads(answer.read_text(encoding="utf-8"))


def _of_side(path: Path, tree: Tree, repository: Path) -> Path:
    """A folder of the repository as the side's checkout has it; any other folder as it is."""
    top = next(parent for parent in (repository.resolve(), *repository.resolve().parents) if (parent / ".git").exists())
    where = path.resolve()
    return tree.root / where.relative_to(top) if where.is_relative_to(top) else where


# --- running -------------------------------------------------------------------------------------------------


def _interleave(pair: Pair, commands: dict[str, list[str]], folder: Path, rounds: int) -> None:
    """Run a cell ``rounds`` times on each side: A B, B A, A B ..."""
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            pair.runs[side].append(_run(pair, side, commands[side], folder))


def _run(pair: Pair, side: str, python: list[str], folder: Path) -> Recorded:
    """One run of a cell in the environment of its side; one that leaves no record becomes one."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", pair.cell.label).strip("-")
    home = folder / side / f"{slug}-{pair.key}" / f"run-{len(pair.runs[side]) + 1}"
    job = pair.jobs[side] | {"folder": str(home.resolve()), "attempt": 1}
    job_file, record, log = home / "job.json", home / "attempt-1.json", home / "attempt-1.log"
    write_atomically(job_file, json.dumps(job, indent=1).encode())
    began, started = datetime.now(UTC), time.monotonic()
    limit_s = float(job["time_limit_s"])
    ending = run_process([*python, *command(job_file)[2:]], log=log, limit_s=limit_s)
    if not record.exists():
        status: Status = "timeout" if ending.timed_out else "killed" if ending.code < 0 else "error"
        message = f"its process ended with code {ending.code} and left no record (log: {log})"
        result = CellResult(
            cell_id=job["cell_id"],
            attempt=1,
            cell=Cell.model_validate(job["cell"]),
            code_version=job["code_version"],
            status=status,
            failure=Failure(phase="unknown", message=message),
            started_at=began.isoformat(timespec="seconds"),
            wall_s=time.monotonic() - started,
            epoch_time_s=Reading.missing("training epochs", "the run left no record of its own"),
        )
        write_result(result, record)
    result = read_result(record)
    return Recorded(record, result, result.environment.device_key if result.environment else "unknown device")


def _fresh(parent: Path) -> Path:
    """The first of ``parent/1``, ``parent/2`` ... that is not there yet, made."""
    number = 1
    while True:
        try:
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        except FileExistsError:
            number += 1
