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
    status,
)
from tpme.bench.commands import list as listing
from tpme.bench.commands.gate import GateCommand
from tpme.bench.commands.options import PlainCommand, PlainGroup
from tpme.bench.console import complain, replace_unencodable
from tpme.bench.errors import UserError, one_line

INTERRUPTED = (129, 130, 143)
"""Exit codes of SIGHUP, SIGINT (into which typer turns a KeyboardInterrupt) and SIGTERM: 128 + the signal."""
ON_INTERRUPT = "interrupted; no partial files are left; run the same command to resume"

app = typer.Typer(
    name="tpme",
    cls=PlainGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # at 80 columns the tables of rich cut long options off
    help="Measure the cost and quality of parameter-efficient fine-tuning in multimodal sequential recommendation.",
)
app.add_typer(prepare.app, name="prepare")
for command in (
    run.run,
    status.status,
    status.cancel,
    report.report,
    choose.choose,
    compare.compare,
    board.board,
    export.export,
    plan.plan,
):
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

    So do errors of the file system, such as no permission or a full disk, and input too large for the memory.
    """
    replace_unencodable()
    try:
        app()
    except UserError as error:
        complain(error)
        sys.exit(2)
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror}")
        sys.exit(2)
    except MemoryError as error:
        complain(f"not enough memory for this ({one_line(error)})")
        sys.exit(2)
    except SystemExit as stop:
        _blame_plugin(stop)
        if stop.code in INTERRUPTED:
            complain(ON_INTERRUPT)
        raise
    except Exception as error:
        _blame_plugin(error)
        raise
    sys.exit(0)


def _blame_plugin(error: BaseException) -> None:
    """End with one line and exit code 2 where the code of a plug-in raised ``error``, or what led to it."""
    if "tpme.methods.registry" not in sys.modules:  # then none was loaded
        return
    from tpme.methods.registry import culprit

    cause: BaseException | None = error
    while cause is not None:
        if place := culprit(cause):
            complain(f"{place}: {one_line(cause)}; correct this method, or leave it out")
            sys.exit(2)
        cause = cause.__cause__ or cause.__context__


if __name__ == "__main__":
    main()
