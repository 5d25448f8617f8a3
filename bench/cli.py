"""The command line: assembles the commands, each in its own file, and turns errors into exit codes.

Command modules import torch, transformers, pandas and matplotlib inside their functions, so that ``tpme --help``
starts at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from tpme.bench.commands import (
    ab,
    baseline,
    board,
    check,
    choose,
    compare,
    doctor,
    export,
    method,
    plan,
    prepare,
    report,
    run,
)
from tpme.bench.commands import list as listing
from tpme.bench.commands.gate import GateCommand
from tpme.bench.commands.options import PlainCommand
from tpme.bench.errors import UserError

INTERRUPTED = (129, 130, 143)
"""Exit codes of SIGHUP, SIGINT (into which typer turns a KeyboardInterrupt) and SIGTERM: 128 + the signal."""
ON_INTERRUPT = "interrupted; no partial files are left; run the same command to resume"

app = typer.Typer(
    name="tpme",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # at 80 columns the tables of rich cut long options off
    help="Measure the cost and quality of parameter-efficient fine-tuning in multimodal sequential recommendation.",
)
app.add_typer(prepare.app, name="prepare")
for command in (run.run, report.report, choose.choose, compare.compare, board.board, export.export, plan.plan):
    app.command(cls=PlainCommand)(command)
app.add_typer(listing.app, name="list")
app.add_typer(method.app, name="method")
app.command(cls=PlainCommand)(doctor.doctor)
app.command(cls=GateCommand)(check.check)
app.command(cls=GateCommand)(ab.ab)
app.command(cls=PlainCommand)(baseline.baseline)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tpme {version('tpme-bench')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _before_the_command(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that take no command."""


def main() -> NoReturn:
    """Entry point: a UserError becomes one line on stderr and exit code 2, Ctrl-C one line and exit code 130.

    So do errors of the file system: no permission, a full disk.
    """
    try:
        app()
    except UserError as error:
        print(f"tpme: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"tpme: {where}{error.strerror}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except SystemExit as stop:
        if stop.code in INTERRUPTED:
            print(f"tpme: {ON_INTERRUPT}", file=sys.stderr)  # noqa: T201
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
