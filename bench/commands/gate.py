"""What ``tpme check`` and ``tpme ab`` share: options, exit codes and the output of their report."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tpme.bench.commands.options import PlainCommand, split_names
from tpme.bench.console import complain
from tpme.bench.errors import UserError, first_problem

if TYPE_CHECKING:
    from tpme.reports.gate.verdict import GateReport, Policy

ERROR = 3
"""Exit code of bad usage and of every error: 1 and 2, as elsewhere, would read as results of the comparison."""

Require = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help="Exit with 2 unless settled in every cell: counter, time, memory, quality."),
]
TimeThreshold = Annotated[float, typer.Option(min=0, help="Relative change of time that counts.")]
ResidentBound = Annotated[float, typer.Option(min=0, help="Relative growth of a CPU's resident peak that counts.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the whole report as JSON.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write Markdown for a pull request.")]
JunitFile = Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML.")]
BenchmarkFile = Annotated[
    Path | None, typer.Option("--benchmark-json", help="Write customSmallerIsBetter entries (github-action-benchmark).")
]
Github = Annotated[bool, typer.Option(envvar="GITHUB_ACTIONS", help="Print GitHub annotations.")]
Everything = Annotated[bool, typer.Option("--all", help="Also show what did not change.")]


class GateCommand(PlainCommand):
    """A command whose errors all exit with ``ERROR``."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments; an error of theirs carries the exit code."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error, whichever click it comes from
                error.exit_code = ERROR  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error ends with one line, or with a traceback where it is a bug."""
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except UserError as error:
            complain(error)
        except OSError as error:  # no permission, a full disk
            message = f"{error.filename}: {error.strerror}" if error.filename else error
            complain(message)
        except Exception:
            traceback.print_exc()
        raise typer.Exit(ERROR)


def policy_of(require: Sequence[str] | None, **bounds: Any) -> Policy:
    """A policy from the options of a command; raises UserError for a value that makes no sense.

    ``require`` holds the values of a repeated option, each a comma-separated list of kinds.
    """
    from pydantic import ValidationError

    from tpme.bench.quantities import Kind
    from tpme.reports.gate.verdict import Policy

    kinds = tuple(kind for given in require or () for kind in split_names(given))
    try:
        return Policy.model_validate({"require": kinds, **bounds})
    except ValidationError as error:
        first = first_problem(error)
        if first.field.startswith("require"):
            raise UserError(f"--require {','.join(kinds)}: choose from {', '.join(get_args(Kind))}") from None
        raise UserError(f"{first.field}: {first.message}") from None


def publish(
    report: GateReport,
    everything: bool,
    github: bool,
    as_json: Path | None,
    as_markdown: Path | None,
    as_junit: Path | None,
    as_benchmark: Path | None,
) -> None:
    """Print the report, write the files that were asked for, and exit with its code."""
    from tpme.bench.console import PlainConsole
    from tpme.bench.record import published
    from tpme.reports.gate.formats import github_annotations, show, write

    report = type(report).model_validate(published(report.model_dump()))
    show(report, PlainConsole(), everything=everything)
    if github:
        print(*github_annotations(report), sep="\n")  # noqa: T201
    write(report, as_json=as_json, as_markdown=as_markdown, as_junit=as_junit, as_benchmark=as_benchmark)
    raise typer.Exit(report.exit_code)
