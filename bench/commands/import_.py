"""``tpme import``: results that others published, as records that reports read, marked as measured by others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpme.bench.commands.options import PlainCommand

if TYPE_CHECKING:
    from tpme.bench.imports.published import Published

app = typer.Typer(no_args_is_help=True, help="Turn published results into records, marked as measured by others.")

Out = Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the records, one a run.")]


@app.command("peft-comparison", cls=PlainCommand)
def import_peft_comparison(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Result files (*.json) of MetaMathQA.")],
    out: Out,
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="Who measured; by default peft's suite.")] = None,
    commit: Annotated[str, typer.Option(metavar="TEXT", help="Commit of the repository the files are from.")] = "",
) -> None:
    """Import the result files of peft's method_comparison suite."""
    from tpme.bench.imports.peft_comparison import NAME, read_folder

    _write(read_folder(folder, _line("--name", name) if name else NAME, _line("--commit", commit)), out)


@app.command("csv", cls=PlainCommand)
def import_csv(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A table with a header and a row for each run.")],
    mapping: Annotated[Path, typer.Option("--map", metavar="FILE", help="TOML file that says what the columns are.")],
    out: Out,
) -> None:
    """Import any table; a TOML file says what its columns are."""
    from tpme.bench.imports.csv_table import read_table

    _write(read_table(file, mapping), out)


def _line(option: str, text: str) -> str:
    from tpme.bench.errors import UserError
    from tpme.bench.names import check_line

    try:
        return check_line(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _write(runs: list[Published], out: Path) -> None:
    from tpme.bench.console import PlainConsole
    from tpme.bench.imports.published import write_runs

    write_runs(runs, out)
    failed = sum(run.status != "ok" for run in runs)
    ends = f", {failed} of runs that did not finish" if failed else ""
    line = (
        f"Written to {out}: {len(runs)} record{'' if len(runs) == 1 else 's'}{ends}, measured by {runs[0].source.name}"
    )
    PlainConsole().print(line, soft_wrap=True)
