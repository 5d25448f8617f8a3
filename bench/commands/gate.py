"""The commands of the gate: ``tpme check``, ``tpme ab``, ``tpme baseline``. Arguments only; the work is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

USAGE = 3
"""Exit code of bad usage: 2, as elsewhere, would say that nothing comparable was measured."""

Require = Annotated[str | None, typer.Option(help="Kinds that must have been compared: counter,time,memory,quality.")]
TimeThreshold = Annotated[float, typer.Option(min=0, help="Relative change of time that counts.")]
ResidentBound = Annotated[float, typer.Option(min=0, help="Relative growth of a CPU's resident peak that counts.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the whole report as JSON.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write Markdown for a pull request.")]
JunitFile = Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML.")]
BenchmarkFile = Annotated[
    Path | None, typer.Option("--benchmark-json", help="Write customSmallerIsBetter entries (github-action-benchmark).")
]
Github = Annotated[bool, typer.Option(envvar="GITHUB_ACTIONS", help="Print GitHub annotations.")]
Everything = Annotated[bool, typer.Option("--all", help="Show also what did not change.")]


class GateCommand(TyperCommand):
    """A command whose bad usage exits with ``USAGE``."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments; an error of theirs carries the exit code."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error, whichever click it comes from
                error.exit_code = USAGE  # type: ignore[attr-defined]
            raise


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("check", cls=GateCommand)(check)
    app.command("ab", cls=GateCommand)(ab)
    app.command("baseline")(baseline)


def check(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Run folders, record files, or one baseline.")],
    baseline: Annotated[Path, typer.Option(help="Baseline file, or a run folder to be used as one.")],
    time_threshold: TimeThreshold = 0.10,
    allocated_bound: Annotated[float, typer.Option(min=0, help="Relative growth of allocated memory.")] = 0.01,
    resident_bound: ResidentBound = 0.05,
    quality_threshold: Annotated[float, typer.Option(min=0, help="Relative loss of Recall or NDCG.")] = 0.05,
    strict: Annotated[bool, typer.Option(help="Any changed counter, missing or new cell fails.")] = False,
    require: Require = None,
    everything: Everything = False,
    github: Github = False,
    as_json: JsonFile = None,
    as_markdown: MarkdownFile = None,
    as_junit: JunitFile = None,
    as_benchmark: BenchmarkFile = None,
) -> None:
    """Compare runs with a baseline. Exit codes: 0 fine, 1 regressed, 2 nothing comparable was measured, 3 error."""
    from tpme.bench.commands.check import check_command, guarded, policy_of

    def work() -> int:
        policy = policy_of(
            require,
            time_threshold=time_threshold,
            allocated_bound=allocated_bound,
            resident_bound=resident_bound,
            quality_threshold=quality_threshold,
            strict=strict,
        )
        return check_command(
            runs,
            baseline,
            policy,
            everything=everything,
            github=github,
            as_json=as_json,
            as_markdown=as_markdown,
            as_junit=as_junit,
            as_benchmark=as_benchmark,
        )

    raise typer.Exit(guarded(work))


def baseline(
    out: Annotated[Path, typer.Option(help="The baseline file.")],
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUNS...", help="Run folders.")] = None,
    count: Annotated[str | None, typer.Option(metavar="MATRIX", help="Count this matrix, run nothing.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Keep what was not measured again.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Write the file anew.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Lay key=value over the matrix: training.epochs=2.")
    ] = None,
    methods_path: Annotated[list[Path] | None, typer.Option(help="Folder with further methods.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where catalogues are kept between runs.")] = None,
) -> None:
    """Write or update the baseline that 'tpme check' compares with."""
    from tpme.bench.commands.check import baseline_command

    raise typer.Exit(
        baseline_command(
            runs or [],
            out,
            count=count,
            settings=settings or [],
            methods_path=methods_path or [],
            store=store,
            mode="replace" if replace else "update" if update else "new",
        )
    )


def ab(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Git revision to compare with.")],
    matrix: Annotated[str, typer.Option(help="Name of a preset, or a TOML file, read once for both sides.")],
    head: Annotated[str | None, typer.Argument(metavar="HEAD", help="Git revision; by default the work tree.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these rows of the matrix: lora,iisan,...")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Lay key=value over the matrix: training.epochs=2.")
    ] = None,
    methods_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with further methods; in the repository: each side's own.")
    ] = None,
    repository: Annotated[Path, typer.Option(help="The git repository that is compared.")] = Path(),
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each cell on each side before judging.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    time_limit: Annotated[float | None, typer.Option(min=1, help="Seconds a run may take.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the records; by default runs/ab.")] = None,
    time_threshold: TimeThreshold = 0.10,
    resident_bound: ResidentBound = 0.05,
    require: Require = None,
    everything: Everything = False,
    github: Github = False,
    as_json: JsonFile = None,
    as_markdown: MarkdownFile = None,
    as_junit: JunitFile = None,
    as_benchmark: BenchmarkFile = None,
) -> None:
    """Compare two revisions of a repository, their runs interleaved on this machine. Exit codes as in 'tpme check'."""
    from tpme.bench.commands.ab import Request, ab_command
    from tpme.bench.commands.check import guarded, policy_of

    def work() -> int:
        return ab_command(
            base,
            head,
            Request(
                matrix=matrix,
                settings=settings or [],
                methods=[name.strip() for name in methods.split(",")] if methods else [],
                methods_path=methods_path or [],
                rounds=rounds,
                device=device,
                time_limit_s=time_limit,
            ),
            policy_of(require, time_threshold=time_threshold, resident_bound=resident_bound),
            repository=repository,
            out=out,
            everything=everything,
            github=github,
            as_json=as_json,
            as_markdown=as_markdown,
            as_junit=as_junit,
            as_benchmark=as_benchmark,
        )

    raise typer.Exit(guarded(work))
