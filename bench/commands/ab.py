"""``tpme ab``: the same cells with two revisions of the code, interleaved on one device.

Base and head take turns (A B B A ...): what slows the machine for a while slows both. A cell that looks changed is
measured once more before it is judged.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tpme.bench.commands import gate
from tpme.bench.commands.options import DeviceName, Settings, split_names
from tpme.bench.errors import UserError, first_problem

if TYPE_CHECKING:
    from rich.console import Console

    from tpme.bench.record import Cell
    from tpme.bench.run.countdown import Countdown
    from tpme.bench.run.job import Job
    from tpme.bench.run.trees import Tree
    from tpme.reports.data.load import Recorded
    from tpme.reports.gate.verdict import CellVerdict, GateReport, Policy

SIDES = ("base", "head")
_SIDE_SCRIPT = Path(__file__).parents[1] / "run" / "side.py"


@dataclass(frozen=True)
class Request:
    """What to run on both sides, and all but the folders of what each side is asked.

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


def ab(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Git revision to compare with.")],
    matrix: Annotated[str, typer.Option(help="Name of a preset, or a TOML file, read once for both sides.")],
    head: Annotated[str | None, typer.Argument(metavar="HEAD", help="Git revision; by default the work tree.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these rows of the matrix: lora,iisan,...")] = None,
    settings: Settings = None,
    methods_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with further methods; in the repository, each side uses its own.")
    ] = None,
    repository: Annotated[Path, typer.Option(help="The git repository that is compared.")] = Path(),
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each cell on each side before judging.")] = 2,
    device: DeviceName = "auto",
    time_limit: Annotated[float | None, typer.Option(min=1, help="Time limit of a run in seconds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the records; by default runs/ab.")] = None,
    time_threshold: gate.TimeThreshold = 0.10,
    resident_bound: gate.ResidentBound = 0.05,
    require: gate.Require = None,
    everything: gate.Everything = False,
    github: gate.Github = False,
    as_json: gate.JsonFile = None,
    as_markdown: gate.MarkdownFile = None,
    as_junit: gate.JunitFile = None,
    as_benchmark: gate.BenchmarkFile = None,
) -> None:
    """Compare two revisions of a repository by interleaved runs.

    Exit codes: 0 no regression, 1 regressed, 2 not settled (see --require), 3 error.
    """
    from tpme.bench.claims import claimed
    from tpme.bench.console import PlainConsole
    from tpme.bench.run.trees import trees

    policy = gate.policy_of(require, time_threshold=time_threshold, resident_bound=resident_bound)
    rows, folders = split_names(methods), methods_path or []
    request = Request(matrix, settings or [], rows, folders, rounds, device, time_limit)
    console = PlainConsole()
    parent = out or Path("runs") / "ab"
    with trees(repository, base, head) as sides, claimed(lambda: _new_folder(parent), keep=True) as (folder, lock):
        console.print(f"{sides[0].name} against {sides[1].name}; records go to {folder}")
        started = time.perf_counter()
        pairs = pair_cells(sides, request, folder, repository)
        report = compare(
            pairs, sides, policy, folder, rounds=request.rounds, started=started, console=console, lock=lock
        )
    gate.publish(report, everything, github, as_json, as_markdown, as_junit, as_benchmark)


def compare(
    pairs: Sequence[Pair],
    sides: tuple[Tree, Tree],
    policy: Policy,
    folder: Path,
    *,
    rounds: int,
    started: float,
    console: Console,
    lock: int | None = None,
) -> GateReport:
    """Run all cells on both sides, what looks changed once more, what is open up to ``MOST_TIMES``, and judge.

    Args:
        pairs: from ``pair_cells``. sides: base and head. folder: for the records. rounds: pairs of runs of each
            cell before it is judged. started: ``time.perf_counter`` of when the command began.
        lock: an open file that this process has locked; each cell holds the lock, too.
    """
    from tpme.bench.run.countdown import Countdown
    from tpme.reports.gate.interleaved import MOST_TIMES, judge_runs, suspicious, undecided
    from tpme.reports.gate.verdict import conclude

    commands = {side: tree.command for side, tree in zip(SIDES, sides, strict=True)}
    both = [pair for pair in pairs if len(pair.jobs) == len(SIDES)]
    names = (sides[0].name, sides[1].name)
    countdown = Countdown(0, console)

    def measure(some: Sequence[Pair], why: str) -> None:
        runs = len(SIDES) * rounds * len(some)
        countdown.total += runs
        line = f"{why}: {runs} runs, {', '.join(pair.cell.label for pair in some)}"
        console.print(line, soft_wrap=True)
        with countdown.shown():
            for pair in some:
                _interleave(pair, commands, folder, rounds, countdown, lock)

    def judge(confirmed: dict[str, int]) -> list[CellVerdict]:
        base, head = ({pair.key: pair.runs[side] for pair in both} for side in SIDES)
        return judge_runs(base, head, policy, names, confirmed) if both else []

    measure(both, "base and head in turn")
    verdicts = judge({})
    doubtful = {cell.key for cell in verdicts if suspicious(cell)}
    times: dict[str, int] = {}
    for number in range(2, MOST_TIMES + 1):
        again = [pair for pair in both if pair.key in doubtful]
        if not again:
            break
        measure(again, "again, what looks changed or is not settled")
        times |= {pair.key: number for pair in again}
        verdicts = judge(dict.fromkeys(times, rounds))
        doubtful = {cell.key for cell in verdicts if undecided(cell)}
    devices = tuple(sorted({run.device_key for pair in both for runs in pair.runs.values() for run in runs}))
    return conclude(
        [*verdicts, *(_one_sided(pair) for pair in pairs if pair not in both)],
        policy,
        command="ab",
        base=names[0],
        head=names[1],
        base_devices=devices,
        head_devices=devices,
        notes=_repeat_notes(times, both),
        duration_s=time.perf_counter() - started,
    )


def _repeat_notes(times: dict[str, int], pairs: Sequence[Pair]) -> list[str]:
    """Which cells were measured more than once."""
    labels = {number: [pair.cell.label for pair in pairs if times.get(pair.key) == number] for number in times.values()}
    return [f"measured {number} times before judging: {', '.join(labels[number])}" for number in sorted(labels)]


def _one_sided(pair: Pair) -> CellVerdict:
    """A cell that only one side can run."""
    from tpme.reports.gate.verdict import CellVerdict

    state: Literal["missing", "new"] = "missing" if "base" in pair.jobs else "new"
    return CellVerdict(key=pair.key, name=pair.cell.label, dataset=pair.cell.dataset, state=state, note=pair.problem)


# --- listing the jobs ----------------------------------------------------------------------------------------


def pair_cells(sides: tuple[Tree, Tree], request: Request, folder: Path, repository: Path) -> list[Pair]:
    """The cells of both sides, paired by what they run; each side lists its jobs with its own code.

    Raises UserError where a side cannot list its jobs, and where nothing is left to run.
    """
    from tpme.reports.gate.measures import cell_key

    pairs: dict[str, Pair] = {}
    problems: dict[str, str] = {}
    for side, tree in zip(SIDES, sides, strict=True):
        answer = _jobs_of_side(side, tree, request, folder, repository)
        problems |= {method: f"{tree.name}: {problem}" for method, problem in answer["problems"].items()}
        for job in answer["jobs"]:
            cell = _parse_job(job, tree.name).cell
            pairs.setdefault(cell_key(cell), Pair(cell_key(cell), cell)).jobs[side] = job
    if not pairs:
        raise UserError(f"nothing to run: {'; '.join(problems.values())}")
    for pair in pairs.values():
        pair.problem = problems.get(pair.cell.method)
    return list(pairs.values())


def _parse_job(content: dict[str, Any], side: str) -> Job:
    """A job as this tpme knows it; the code of ``side`` may know fields that this one does not."""
    from pydantic import ValidationError

    from tpme.bench.run.job import Job

    try:
        return Job.model_validate({name: value for name, value in content.items() if name in Job.model_fields})
    except ValidationError as error:
        message = first_problem(error).message
        raise UserError(f"{side}: this tpme cannot read its cells ({message})") from None


def _jobs_of_side(side: str, tree: Tree, request: Request, folder: Path, repository: Path) -> Any:
    """The jobs of a side, listed by its own code in its own process."""
    from tpme.bench.run.launch import choose_device
    from tpme.bench.run.matrix import presets
    from tpme.bench.writing import write_atomically

    question, answer = folder / f"{side}.request.json", folder / f"{side}.answer.json"
    source = request.matrix if request.matrix in presets() else str(Path(request.matrix).resolve())
    content = asdict(request) | {
        "matrix": source,
        "methods_path": [str(_in_checkout(path, tree, repository)) for path in request.methods_path],
        "device": choose_device(request.device),
        "store": str((folder / f"{side}-store").resolve()),
        "runs": str((folder / side).resolve()),
        "answer": str(answer.resolve()),
    }
    write_atomically(question, json.dumps(content, indent=1).encode())
    command = [*tree.command, str(_SIDE_SCRIPT), str(question)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UserError(f"{tree.name}: cannot list its cells: {lines[-1].removeprefix('tpme: ')}")
    return json.loads(answer.read_text(encoding="utf-8"))


def _in_checkout(path: Path, tree: Tree, repository: Path) -> Path:
    """A folder of the repository as the side's checkout has it; any other folder as it is."""
    top = next(parent for parent in (repository.resolve(), *repository.resolve().parents) if (parent / ".git").exists())
    where = path.resolve()
    return tree.root / where.relative_to(top) if where.is_relative_to(top) else where


# --- running -------------------------------------------------------------------------------------------------


def _interleave(
    pair: Pair, commands: dict[str, list[str]], folder: Path, rounds: int, countdown: Countdown, lock: int | None
) -> None:
    """Run a cell ``rounds`` times on each side: A B, B A, A B ..."""
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            pair.runs[side].append(_run(pair, side, commands[side], folder, countdown, lock))
            countdown.step()


def _run(pair: Pair, side: str, python: list[str], folder: Path, countdown: Countdown, lock: int | None) -> Recorded:
    """One run of a cell in the environment of its side; one that leaves no record gets one."""
    from tpme.bench.run.attempt import run_job
    from tpme.bench.run.launch import slug
    from tpme.reports.data.load import Recorded

    home = folder / side / f"{slug(pair.cell)}-{pair.key}" / f"run-{len(pair.runs[side]) + 1}"
    content = pair.jobs[side] | {"folder": str(home.resolve()), "attempt": 1}
    job = _parse_job(content, side)

    def show(what: str, share: float) -> None:
        countdown.show(f"{pair.cell.label}, {side}: {what}", share)

    result = run_job(job, python, json.dumps(content, indent=1).encode(), show, lock=lock)
    device_key = result.environment.device_key if result.environment else "unknown device"
    return Recorded(job.file(".json"), result, device_key)


def _new_folder(parent: Path) -> Path:
    """Make the first of ``parent/1``, ``parent/2`` ... that does not exist yet; those of killed runs are removed."""
    from tpme.bench.claims import remove_unclaimed

    for folder in parent.glob("[0-9]*"):
        remove_unclaimed(folder)
    number = 1
    while True:
        try:
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        except FileExistsError:
            number += 1
