"""List the jobs of one side of ``tpme ab`` with that side's own code.

Run as a script with a request file (see ``bench/commands/ab.py``), in that side's environment: every import below is
the side's, which may be older than this file. Writes the jobs of all cells and what a method of it cannot run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.run.launch import make_jobs
from tpme.bench.run.matrix import MatrixFile, load_matrix


def main() -> None:
    """Read the request named by the first argument, write its answer."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    matrix = load_matrix(request["matrix"], request["settings"])
    jobs, problems = [], {}
    for part in _parts(matrix, request["methods"]):
        try:
            jobs += _jobs(part, request)
        except UserError as error:
            problems[part.methods[0].name] = str(error)
    Path(request["answer"]).write_text(json.dumps({"jobs": jobs, "problems": problems}), encoding="utf-8")


def _parts(matrix: MatrixFile, methods: list[str]) -> list[MatrixFile]:
    """A matrix for each method: one that a revision does not know does not stop the others."""
    known = [entry.name for entry in matrix.methods]
    for name in methods:
        if name not in known:
            raise UserError(f"--methods {name}: the matrix has no such row, only {', '.join(dict.fromkeys(known))}")
    rows = [entry for entry in matrix.methods if not methods or entry.name in methods]
    return [matrix.model_copy(update={"methods": (entry,)}) for entry in rows]


def _jobs(matrix: MatrixFile, request: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = make_jobs(
        matrix,
        Path(request["runs"]),
        Path(request["store"]),
        device=request["device"],
        methods_path=[Path(path) for path in request["methods_path"]],
        time_limit_s=request["time_limit_s"],
        console=Console(quiet=True),
    )
    return [job.model_dump(mode="json") for job in jobs]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"tpme: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
