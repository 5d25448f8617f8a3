"""``tpme choose``: the rows within an engineer's limits, best first, and why the others fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from tpme.bench.commands.options import AsJson, Records
from tpme.bench.quantities import BYTES, parse_quantity

Share = Annotated[float | None, typer.Option(min=0, max=1, help="Minimum mean over the test users.")]


def choose(
    runs: Records,
    max_memory: Annotated[
        str | None, typer.Option(help="Maximum memory at any time of a run, cache and validation included: 8G, 500MB.")
    ] = None,
    max_training_memory: Annotated[str | None, typer.Option(help="Maximum memory M, of training alone.")] = None,
    max_epoch_time: Annotated[str | None, typer.Option(help="Longest epoch T: 500ms, 60s, 2min.")] = None,
    max_params: Annotated[str | None, typer.Option(help="Maximum trainable parameters P: 500K, 5M.")] = None,
    min_ndcg10: Share = None,
    min_recall10: Share = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Worst value of a metric that records name: accuracy=0.7."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or part of the device's name: H200.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the rows within your limits, best first.

    Also says why the others fail. Exit code 0 if any row passes, else 1.
    """
    from tpme.bench.console import PlainConsole, print_json
    from tpme.reports import choose as logic
    from tpme.reports.report import make_report
    from tpme.reports.tables.terminal import to_terminal

    def limit(option: str, text: str | None, units: Mapping[str, float], example: str) -> float | None:
        return None if text is None else parse_quantity(option, text, units, example)

    bounds = {
        "peak_bytes": limit("--max-memory", max_memory, BYTES, "8G"),
        "memory_bytes": limit("--max-training-memory", max_training_memory, BYTES, "8G"),
        "epoch_time_s": limit("--max-epoch-time", max_epoch_time, logic.SECONDS, "60s"),
        "trainable_millions": limit("--max-params", max_params, logic.MILLIONS, "5M"),
        "ndcg_10": min_ndcg10,
        "recall_10": min_recall10,
    }
    sections = make_report(runs).sections
    of_metrics, metrics = logic.metric_limits(sections, metric or ())
    given = {key: bound for key, bound in bounds.items() if bound is not None}
    limits = logic.Limits(given | of_metrics, device, metrics)
    choices = logic.choose(sections, limits)
    if as_json:
        print_json(logic.to_json(choices, limits))
    else:
        console = PlainConsole()
        for choice in choices:
            if choice.qualifying:
                console.print(to_terminal(logic.qualifying_table(choice, limits), console.width), "")
            if choice.rejected:
                console.print(to_terminal(logic.rejected_table(choice, limits), console.width), "")
    raise typer.Exit(0 if any(choice.qualifying for choice in choices) else 1)
