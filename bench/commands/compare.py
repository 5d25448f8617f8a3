"""``tpme compare``: two sets of results, neutral differences with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpme.bench.commands.options import AsJson


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Run folder or record file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Run folder or record file, set against A.")],
    as_json: AsJson = False,
) -> None:
    """Show how two sets of results differ, with intervals.

    Nothing passes or fails. Exit code 0, 2 for bad input.
    """
    from tpme.bench.console import PlainConsole, print_json
    from tpme.reports.compare import compare as logic
    from tpme.reports.compare_tables import print_sets, to_json

    sets = logic(a, b)
    if as_json:
        print_json(to_json(sets))
    else:
        print_sets(sets, PlainConsole())
