"""``tpme status`` and ``tpme cancel``: how the cells of a run folder are doing, and ending its jobs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpme.bench.commands.options import AsJson
from tpme.bench.console import PlainConsole, print_json

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


def status(run: Run, as_json: AsJson = False) -> None:
    """Show what the cells of a run are doing.

    How many are finished, running, where, and waiting, for what; in Slurm, too, while no launcher is there.
    """
    import json

    from rich.table import Table

    from tpme.bench.run.cell_states import cell_states, counts
    from tpme.bench.text import escaped

    states = cell_states(run)
    if as_json:
        print_json(json.dumps([cell._asdict() for cell in states], indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("State", "Cells", ""):
        table.add_column(title, overflow="fold")
    for state, number, words in counts(states):
        table.add_row(state, str(number), escaped(words))
    PlainConsole().print(table)


def cancel(run: Run) -> None:
    """End the jobs that a run has in Slurm.

    Finished cells keep their records; the command of the run starts the others again.
    """
    from tpme.bench.errors import UserError
    from tpme.bench.run.engines.slurm_jobs import cancel_run, read_jobs

    jobs = read_jobs(run)
    if jobs is None or not jobs.submissions:
        raise UserError(f"{run}: it has no jobs in Slurm; cells on this machine are ended by Ctrl-C in their launcher")
    number = cancel_run(run, jobs)
    PlainConsole().print(f"{number} {'job' if number == 1 else 'jobs'} cancelled; 'tpme run' resumes.")
