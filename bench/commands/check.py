"""``tpme check``: runs against a baseline, with the exit codes that CI reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpme.bench.commands import gate


def check(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS", help="Run folders, record files, or one baseline.")],
    baseline: Annotated[Path, typer.Option(help="Baseline file, or a run folder to be used as one.")],
    time_threshold: gate.TimeThreshold = 0.10,
    allocated_bound: Annotated[
        float, typer.Option(min=0, help="Relative growth of memory allocated on a GPU that counts.")
    ] = 0.01,
    resident_bound: gate.ResidentBound = 0.05,
    quality_threshold: Annotated[float, typer.Option(min=0, help="Relative loss of quality that counts.")] = 0.05,
    strict: Annotated[bool, typer.Option(help="Fail on any changed counter and any missing or new cell.")] = False,
    require: gate.Require = None,
    everything: gate.Everything = False,
    github: gate.Github = False,
    as_json: gate.JsonFile = None,
    as_markdown: gate.MarkdownFile = None,
    as_junit: gate.JunitFile = None,
    as_benchmark: gate.BenchmarkFile = None,
) -> None:
    """Compare runs with a baseline.

    The first line says what was compared. Exit codes: 0 no regression, 1 regressed, 2 not settled (see --require),
    3 error.
    """
    from tpme.reports.gate.check import check_runs

    policy = gate.policy_of(
        require,
        time_threshold=time_threshold,
        allocated_bound=allocated_bound,
        resident_bound=resident_bound,
        quality_threshold=quality_threshold,
        strict=strict,
    )
    report = check_runs(runs, baseline, policy)
    gate.publish(report, everything, github, as_json, as_markdown, as_junit, as_benchmark)
