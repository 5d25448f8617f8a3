"""``tpme board``: one static page over many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def board(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Run folders, or folders of run folders.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html.")] = Path("board"),
) -> None:
    """Write one page over many runs.

    Who leads where, history over versions, every number linked to its record.
    """
    from tpme.bench.console import PlainConsole
    from tpme.reports.board import write_board

    PlainConsole().print(f"Written to {write_board(runs, out)}", soft_wrap=True)
