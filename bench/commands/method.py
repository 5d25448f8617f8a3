"""``tpme method check``: the contract suite on one method, without a clone of the repository."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from tpme.bench.commands.options import MethodsPath, PlainCommand, methods_like

app = typer.Typer(no_args_is_help=True, help="Check your own fine-tuning method.")


@app.callback()
def _group() -> None:
    """Keep ``check`` a subcommand: Typer would drop the name of an only command."""


@app.command(cls=PlainCommand)
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=methods_like, help="Name of the method.")],
    methods_path: MethodsPath = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Set an option of the method: rank=4.", metavar="OPTION=VALUE")
    ] = None,
    slow: Annotated[
        bool, typer.Option("--slow", help="Also run torch.compile and a second pair of encoders (minutes).")
    ] = False,
) -> None:
    """Check that a method keeps the contract.

    Trains it on small encoders and prints a line per check. Exit codes: 0 keeps the contract, 1 does not, 2 bad input.
    """
    from tpme.bench.claims import scratch_folder
    from tpme.bench.console import PlainConsole
    from tpme.bench.contract.checks import check_method
    from tpme.bench.contract.world import SmallWorld
    from tpme.bench.run.settings import apply_setting

    values: dict[str, Any] = {}
    for option in options or []:
        apply_setting(values, option)
    console, counts = PlainConsole(soft_wrap=True), Counter[str]()
    with scratch_folder("check") as (folder, _):
        for result in check_method(SmallWorld(folder), name, values, methods_path=methods_path or [], slow=slow):
            console.print(str(result), style={"failed": "red", "skipped": "dim"}.get(result.status))
            counts[result.status] += 1
    passed = counts["passed"] > 0 and not counts["failed"]
    numbers = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped"))
    console.print(f"{name}: {'keeps the contract' if passed else 'does not keep the contract'} ({numbers})")
    raise typer.Exit(0 if passed else 1)
